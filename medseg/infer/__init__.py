"""Volume and bundle to labels or probabilities on the source grid."""
