"""Fine-tuned bundles: what is written is read, and what was touched, is another's or a trap is refused."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medseg.errors import BundleError
from medseg.nets.sam import Sam, build_sam, load_sam
from medseg.nets.sam_bundle import CARD, WEIGHTS, Card, hash_card, is_tuned, read_card, save_tuned

CARD_OF = Card(base="mobile-sam", base_sha256="ab", licence="Apache-2.0", size=512, dataset="Balls")


@pytest.fixture(scope="module")
def model() -> Sam:
    torch.manual_seed(0)
    return build_sam("mobile-sam")


@pytest.fixture(scope="module")
def bundle(model: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "bundle"
    save_tuned(folder, model, CARD_OF)
    return folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    for file in bundle.iterdir():  # links to weights would be refused, so their content is small change
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    return target


def test_what_is_written_is_read_as_folder_run_folder_and_zip(
    bundle: Path, model: Sam, tmp_path: Path
) -> None:
    for path in (bundle, bundle.parent, zipped(bundle, tmp_path / "tuned.medseg")):
        assert is_tuned(path)
        assert read_card(path) == CARD_OF.replace(sha256=read_card(bundle).sha256)
        found = load_sam(path, "mobile-sam").state_dict()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert load_sam(bundle).spec.name == "mobile-sam"
    assert "Apache-2.0" in (bundle / "README.md").read_text()
    assert len(hash_card(bundle)) == 64


def test_the_weights_alone_are_a_checkpoint_too(bundle: Path) -> None:
    assert load_sam(bundle / WEIGHTS).spec.name == "mobile-sam"


def test_asked_for_another_network_it_says_what_it_is(bundle: Path) -> None:
    with pytest.raises(BundleError, match="holds mobile-sam, not lite-medsam"):
        load_sam(bundle, "lite-medsam")


def test_changed_weights_are_refused(copy: Path) -> None:
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(BundleError, match="changed or damaged"):
        load_sam(copy)


def test_weights_of_another_network_under_a_right_hash_are_refused(tmp_path: Path) -> None:
    save_tuned(tmp_path / "wrong", torch.nn.Linear(2, 2), CARD_OF)
    with pytest.raises(BundleError, match="weights are missing"):
        load_sam(tmp_path / "wrong")
    save_tuned(tmp_path / "odd", torch.nn.Linear(2, 2), CARD_OF.replace(base="mine"))
    with pytest.raises(BundleError, match="mine"):
        load_sam(tmp_path / "odd")
    with pytest.raises(BundleError, match="holds mine, not mobile-sam"):
        load_sam(tmp_path / "odd", "mobile-sam")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: (folder / CARD).write_text("[1, 2]"), "expected a mapping"),
        (lambda folder: (folder / CARD).write_text('{"base": 3}'), "missing"),
        (lambda folder: (folder / "weights.pkl").write_text(""), "does not belong"),
        (lambda folder: (folder / WEIGHTS).unlink(), "weights.safetensors is missing"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "README.md"), "weights.safetensors is missing"),
        (
            lambda folder: (folder / CARD).write_text(
                json.dumps({**json.loads((folder / CARD).read_text()), "schema_version": 2})
            ),
            "newer than this medseg",
        ),
    ],
)
def test_a_bundle_with_something_wrong_is_refused_with_its_name(
    copy: Path, change: object, word: str
) -> None:
    change(copy)  # type: ignore[operator]
    with pytest.raises(BundleError, match=word) as caught:
        load_sam(copy)
    assert "copy" in str(caught.value)


def test_other_folders_and_files_are_no_tuned_sam(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert not is_tuned(tmp_path) and not is_tuned(tmp_path / "x.safetensors")
    assert not is_tuned(tmp_path / "nothing")
    with pytest.raises(BundleError, match="no promptable"):
        read_card(tmp_path)
