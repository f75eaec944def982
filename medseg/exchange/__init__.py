"""Models of other programs: nnU-Net, MONAI, ONNX and OpenVINO, in and out."""
