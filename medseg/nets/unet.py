"""nnU-Net's two networks, plain and residual encoder U-Net, in 2D and 3D, from torch alone.

Parameter names are those of dynamic_network_architectures 0.4 (nnU-Net 2.8.1), so weights go over
unchanged; the aliases that it also stores (``all_modules``, ``decoder.encoder``) are left out. No MONAI
here: the predictor starts in a second because this file needs torch only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, cat, nn

if TYPE_CHECKING:
    from medseg.plan.schema import Architecture


# nnU-Net's slope; also the `a` of its Kaiming initialisation.
NEGATIVE_SLOPE = 0.01

_CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, type[nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOL: dict[int, type[nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}

Axes = tuple[int, ...]


class ConvNormAct(nn.Module):
    """Convolution, instance norm, and LeakyReLU unless `act` is False."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Axes, stride: Axes, bias: bool = True, act: bool = True
    ) -> None:
        super().__init__()
        dimensions = len(kernel)
        padding = tuple((k - 1) // 2 for k in kernel)
        self.conv = _CONV[dimensions](inputs, outputs, kernel, stride, padding, bias=bias)
        self.norm = _NORM[dimensions](outputs, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, ...) to (n, outputs, ...)."""
        return cast(Tensor, self.nonlin(self.norm(self.conv(x))))


class ConvStack(nn.Module):
    """`count` convolutions in a row; the first carries the stride."""

    def __init__(self, count: int, inputs: int, outputs: int, kernel: Axes, stride: Axes) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.convs = nn.Sequential(
            *(
                ConvNormAct(outputs if i else inputs, outputs, kernel, ones if i else stride)
                for i in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, ...) to (n, outputs, ...)."""
        return cast(Tensor, self.convs(x))


class ResidualBlock(nn.Module):
    """Two convolutions around a skip; the skip averages where it strides (ResNet-D, arXiv 1812.01187)."""

    def __init__(self, inputs: int, outputs: int, kernel: Axes, stride: Axes) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.conv1 = ConvNormAct(inputs, outputs, kernel, stride)
        self.conv2 = ConvNormAct(outputs, outputs, kernel, ones, act=False)
        skip: list[nn.Module] = []
        if stride != ones:
            skip.append(_POOL[len(kernel)](stride, stride))
        if inputs != outputs:
            skip.append(ConvNormAct(inputs, outputs, ones, ones, bias=False, act=False))
        self.skip = nn.Sequential(*skip)
        self.nonlin2 = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, ...) to (n, outputs, ...)."""
        return cast(Tensor, self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x)))


class ResidualStack(nn.Module):
    """`count` residual blocks in a row; the first carries the stride."""

    def __init__(self, count: int, inputs: int, outputs: int, kernel: Axes, stride: Axes) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(outputs if i else inputs, outputs, kernel, ones if i else stride)
                for i in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, ...) to (n, outputs, ...)."""
        return cast(Tensor, self.blocks(x))


class PlainEncoder(nn.Module):
    """A stack of convolutions a resolution."""

    def __init__(self, in_channels: int, architecture: "Architecture") -> None:
        super().__init__()
        # One Sequential around each stack: nnU-Net keeps a place for a pooling layer there.
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ConvStack(*arguments))
                for arguments in _stage_arguments(in_channels, architecture)
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of every stage, finest first."""
        return _run_stages(self.stages, x)


class ResidualEncoder(nn.Module):
    """A stem of one convolution, then a stack of residual blocks a resolution."""

    def __init__(self, in_channels: int, architecture: "Architecture") -> None:
        super().__init__()
        first, kernel = architecture.features_per_stage[0], architecture.kernel_sizes[0]
        self.stem = ConvStack(1, in_channels, first, kernel, (1,) * len(kernel))
        self.stages = nn.Sequential(
            *(ResidualStack(*arguments) for arguments in _stage_arguments(first, architecture))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of every stage, finest first."""
        return _run_stages(self.stages, self.stem(x))


def _stage_arguments(
    inputs: int, architecture: "Architecture"
) -> list[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]]:
    features = architecture.features_per_stage
    before = (inputs, *features[:-1])
    return list(
        zip(
            architecture.blocks_per_stage,
            before,
            features,
            architecture.kernel_sizes,
            architecture.strides,
            strict=True,
        )
    )


def _run_stages(stages: nn.Sequential, x: Tensor) -> list[Tensor]:
    features = []
    for stage in stages:
        x = stage(x)
        features.append(x)
    return features


class Decoder(nn.Module):
    """From the bottleneck up; a segmentation head at every resolution (all are always built)."""

    def __init__(self, out_channels: int, architecture: "Architecture") -> None:
        super().__init__()
        features, kernels = architecture.features_per_stage, architecture.kernel_sizes
        ones = (1,) * architecture.dimensions
        up, conv = _UP[architecture.dimensions], _CONV[architecture.dimensions]
        stages, transpconvs, heads = [], [], []
        levels = range(architecture.n_stages - 2, -1, -1)
        for count, level in zip(architecture.decoder_convs_per_stage, levels, strict=True):
            width, stride = features[level], architecture.strides[level + 1]
            transpconvs.append(up(features[level + 1], width, stride, stride))
            stages.append(ConvStack(count, 2 * width, width, kernels[level], ones))
            heads.append(conv(width, out_channels, 1))
        self.stages = nn.ModuleList(stages)
        self.transpconvs = nn.ModuleList(transpconvs)
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, features: list[Tensor], deep_supervision: bool) -> Tensor | list[Tensor]:
        """Return logits at full resolution, or with deep supervision at every one, finest first."""
        x = features.pop()
        outputs: list[Tensor] = []
        last = len(self.stages) - 1
        for step, (up, stage, head) in enumerate(
            zip(self.transpconvs, self.stages, self.seg_layers, strict=True)
        ):
            x = stage(cat((up(x), features.pop()), 1))
            if deep_supervision or step == last:
                outputs.append(head(x))
        return outputs[::-1] if deep_supervision else outputs[0]


class UNet(nn.Module):
    """Encoder and decoder with skips at every resolution.

    Attributes
    ----------
    deep_supervision : bool
        True: ``forward`` returns a list of logits, finest first, one a resolution but the coarsest.
        False: one tensor. May be set at any time; the weights are the same.
    """

    def __init__(
        self, encoder: nn.Module, out_channels: int, architecture: "Architecture", deep_supervision: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(out_channels, architecture)
        self.deep_supervision = deep_supervision
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(n, in_channels, ...) to logits (n, out_channels, ...)."""
        return cast("Tensor | list[Tensor]", self.decoder(self.encoder(x), self.deep_supervision))


class PlainUNet(UNet):
    """nnU-Net's PlainConvUNet (Isensee et al., Nature Methods 2021)."""

    def __init__(
        self,
        architecture: "Architecture",
        in_channels: int,
        out_channels: int,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            PlainEncoder(in_channels, architecture), out_channels, architecture, deep_supervision
        )


class ResidualEncoderUNet(UNet):
    """nnU-Net's ResidualEncoderUNet (Isensee et al., arXiv 2404.09556)."""

    def __init__(
        self,
        architecture: "Architecture",
        in_channels: int,
        out_channels: int,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            ResidualEncoder(in_channels, architecture), out_channels, architecture, deep_supervision
        )


def _initialize(module: nn.Module) -> None:
    """Kaiming normal weights, no bias; a residual block starts as its skip (nnU-Net's ``initialize``)."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        if module.weight.is_meta:  # only shapes are wanted; torch would load its compiler, a second of it
            return
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ResidualBlock):
        nn.init.zeros_(cast(Tensor, module.conv2.norm.weight))
        nn.init.zeros_(cast(Tensor, module.conv2.norm.bias))


def downsampling(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return by how much the coarsest stage is smaller than the input, an axis.

    >>> downsampling([(1, 1, 1), (1, 2, 2), (2, 2, 2)])
    (2, 4, 4)
    """
    total = [1] * len(strides[0])
    for stride in strides:
        total = [whole * step for whole, step in zip(total, stride, strict=True)]
    return tuple(total)
