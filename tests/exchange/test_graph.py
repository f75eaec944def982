"""The description of a graph says what a program needs around it, whatever the format."""

from dataclasses import replace

import pytest
import torch

from medseg.errors import BundleError
from medseg.exchange.graph import build_graph, describe, example, size_bytes, takes_any_size
from medseg.labels import LabelSet
from tests.exchange.graphs import tiny
from tests.infer.models import tiny_bundle


def test_grid_labels_normalisation_and_tiles_are_described():
    labels = LabelSet.parse({"background": 0, "größer": [1, 2], "核": 2}, [1, 2])
    bundle = tiny(("ct", "zscore"), labels=labels, transpose=(2, 0, 1), spacing=(2.0, 1.0, 1.5))
    found = describe(replace(bundle, digest="d1"), ("0",))
    assert found["bundle_sha256"] == "d1"
    assert found["folds"] == ["0"]
    assert found["input"]["spacing"] == [2.0, 1.0, 1.5]
    assert found["input"]["patch_size"] == [8, 8, 8]
    assert found["input"]["multiple_of"] == [2, 2, 2]
    assert found["input"]["pad_value"] == [1.0, 0.0]  # the mean of the CT statistics, which becomes 0
    assert found["output"]["kind"] == "regions"
    assert found["output"]["names"] == ["größer", "核"]
    assert found["output"]["regions_class_order"] == [1, 2]
    assert found["axes"]["transpose_forward"] == [2, 0, 1]
    assert found["tiles"]["mirror_axes"] == [0, 1, 2]
    assert found["intensity"]["0"]["percentile_99_5"] == 8
    assert [channel["where"] for channel in found["normalization"]] == ["graph", "before"]
    assert found["normalization"][1]["nonzero_only"] is False


def test_classes_are_named_in_the_order_of_the_outputs():
    labels = LabelSet.parse({"background": 0, "cyst": 2, "kidney": 1, "ignore": 3})
    assert describe(tiny_bundle(labels=labels), ("0",))["output"]["names"] == ["background", "kidney", "cyst"]


def test_a_model_trained_without_flips_and_one_with_sides_say_so():
    still = replace(tiny_bundle(), card={"mirroring": False})
    assert describe(still, ("0",))["tiles"]["mirror_axes"] == []
    sided = tiny_bundle(labels=LabelSet.parse({"background": 0, "kidney_left": 1, "kidney_right": 2}))
    assert describe(sided, ("0",))["tiles"]["sided_labels"] == ["kidney_left", "kidney_right"]


def test_a_cascade_names_its_extra_channels():
    found = describe(tiny_bundle("3d_cascade_fullres", previous=tiny_bundle()), ("0",))["input"]
    assert found["channels_of_first_stage"] == ["1", "2"]
    assert found["pad_value"] == [0.0, 0.0, 0.0]


def test_without_a_fixed_normalisation_the_graph_is_the_network():
    bundle = tiny_bundle()
    graph = build_graph(bundle, ("0",))
    assert not graph.clips
    assert not graph.scales
    x = torch.randn_like(example(bundle))
    with torch.inference_mode():
        assert torch.equal(graph(x), bundle.network("0")(x))
    assert size_bytes(graph) == 4 * sum(value.numel() for value in bundle.state_dict("0").values())


def test_windows_fix_the_size_of_tiles():
    assert takes_any_size(tiny(("zscore",)))
    assert not takes_any_size(tiny(("zscore",), network="swin-unetr", patch=(32, 32, 32)))


def test_ct_statistics_that_the_plan_lacks_are_missed():
    bundle = tiny(("ct",))
    with pytest.raises(BundleError, match="intensities"):
        build_graph(replace(bundle, plan=bundle.plan.replace(intensity={})), ("0",))
