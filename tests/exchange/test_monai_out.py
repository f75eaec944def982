"""An exported MONAI bundle runs without medseg and finds what medseg finds."""

import ast
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg.errors import BundleError, OutputError
from medseg.exchange import load_model
from medseg.exchange.graph import STEP_KINDS
from medseg.exchange.monai_out import export
from medseg.geometry.orient import from_ras
from medseg.infer import Predictor
from medseg.infer.sliding import sliding_window
from medseg.io import list_cases, read_image, write
from medseg.labels import LabelSet
from medseg.postprocess import Postprocessing, apply
from medseg.preprocess import preprocess
from medseg.preprocess.restore import restore_labels
from medseg.volume import Geometry, Volume
from tests.infer.models import image, tiny_bundle, tiny_plan

REGIONS = LabelSet.parse({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
SIDED = LabelSet.parse({"background": 0, "kidney_left": 1, "kidney_right": 2})
EQUAL_VOXELS = 0.999


@pytest.fixture(autouse=True)
def _quiet_monai():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai")
        yield


@pytest.fixture
def on_path(monkeypatch):
    """Put a bundle's folder on the path, and forget its ``scripts`` afterwards."""

    def prepend(folder):
        monkeypatch.syspath_prepend(str(folder))

    yield prepend
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


def exported(bundle, folder, fold=None):
    export(bundle, folder, fold)
    return json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))


# As `python -m monai.bundle`, with medseg made impossible to import.
RUN = "import sys, runpy; sys.modules['medseg'] = None; runpy.run_module('monai.bundle', run_name='__main__')"


def run_bundle(bundle, images, out, *more):
    words = [sys.executable, "-c", RUN, "run", "--config_file", str(bundle / "configs" / "inference.json")]
    words += ["--bundle_root", str(bundle), "--dataset_dir", str(images), "--output_dir", str(out), *more]
    done = subprocess.run(words, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def assert_same_labels(path, ours):
    theirs = nib.load(path)
    labels = np.asarray(theirs.dataobj)
    assert labels.dtype == ours.array.dtype
    assert ours.geometry.matches(Geometry(labels.shape, theirs.affine))
    assert (labels == ours.array[0]).mean() >= EQUAL_VOXELS
    assert len(np.unique(labels)) > 1


def test_monai_runs_a_two_channel_model_of_regions_as_medseg_does(golden_dir, tmp_path):
    source = golden_dir / "inference" / "g_region_ignore_two_channel_mr"
    bundle = load_model(source / "model")
    export(bundle, tmp_path / "bundle", None)
    case = list_cases(source / "imagesTs", 2)[0]
    (tmp_path / "images").mkdir()
    for file in case.images:
        shutil.copy(file, tmp_path / "images")
    run_bundle(tmp_path / "bundle", tmp_path / "images", tmp_path / "out", "--inferer#mirror_axes", "[0]")
    bundle = replace(bundle, mirror_axes=(0,))  # eight flips take four times as long
    ours = Predictor(bundle, threads=1, device="cpu").segment(read_image(case)).volume
    assert_same_labels(tmp_path / "out" / f"{case.name}_seg.nii.gz", ours)


def test_monai_runs_folds_on_an_oblique_grid_with_an_image_of_one_file(tmp_path):
    bundle = tiny_bundle(folds=2, transpose=(2, 0, 1), spacing=(2.0, 1.0, 1.0))
    bundle = replace(bundle, postprocessing={"steps": [{"kind": "keep_largest", "labels": [1]}]})
    export(bundle, tmp_path / "bundle", None)
    volume = image()
    write(volume, tmp_path / "images" / "Fall ä.nii.gz")
    run_bundle(tmp_path / "bundle", tmp_path / "images", tmp_path / "out", "--inferer#mirror_axes", "[]")
    ours = Predictor(bundle, mirror=False, threads=1, device="cpu").segment(volume).volume
    assert_same_labels(tmp_path / "out" / "Fall ä_seg.nii.gz", ours)


GOLDEN_RUN = """
import sys, monai.bundle
sys.modules["medseg"] = None
for model in sys.argv[2:]:
    root = sys.argv[1] + "/" + model
    monai.bundle.run(config_file=root + "/bundle/configs/inference.json", bundle_root=root + "/bundle",
                     dataset_dir=root + "/images", output_dir=root, **{"inferer#mirror_axes": []})
"""
GOLDEN = ["a_hippocampus", "b_aniso_ct", "h_2d_aniso_ct", "i_resenc_hippocampus"]


def test_labels_of_every_kind_of_model_are_medsegs(golden_dir, tmp_path):
    cases = {}
    for model in GOLDEN:
        source = golden_dir / "inference" / model
        cases[model] = list_cases(source / "imagesTs", 1)[1]
        export(load_model(source / "model"), tmp_path / model / "bundle", None)
        (tmp_path / model / "images").mkdir()
        shutil.copy(cases[model].images[0], tmp_path / model / "images")
    words = [sys.executable, "-c", GOLDEN_RUN, str(tmp_path), *GOLDEN]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for model, case in cases.items():
        bundle = load_model(golden_dir / "inference" / model / "model")
        ours = Predictor(bundle, mirror=False, threads=1, device="cpu").segment(read_image(case)).volume
        assert_same_labels(tmp_path / model / f"{case.name}_seg.nii.gz", ours)


GRIDS = [
    {},
    {"transpose": (2, 0, 1), "spacing": (0.7, 1.1, 0.9)},
    {"transpose": (1, 2, 0), "spacing": (5.0, 0.9, 0.9)},  # slice by slice on the way back
    {"patch": (8, 8), "spacing": (1.0, 0.9, 1.2)},
    {"labels": REGIONS, "channels": ("T1", "T2"), "spacing": (1.3, 0.8, 1.0)},
    {"transpose": (2, 0, 1), "spacing": (0.7, 1.1, 0.9), "reader": "NibabelIOWithReorient"},
]
SCHEMES = [("zscore", True), ("zscore", False), ("ct", False), ("rescale-0-1", False), ("none", False)]


def metatensor(volume):
    from monai.data import MetaTensor

    return MetaTensor(torch.from_numpy(volume.array), affine=torch.tensor(volume.geometry.affine))


def transforms_of(config):
    """Return the bundle's two transforms, from the module that is copied into it."""
    from medseg.exchange.monai_scripts import transforms

    def build(values):
        kind = getattr(transforms, values["_target_"].rsplit(".", 1)[1])
        return kind(**{name: value for name, value in values.items() if not name.startswith("_")})

    return build(config["preprocessing"]["transforms"][2]), build(config["postprocessing"]["transforms"][0])


@pytest.mark.parametrize("thick", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda value: "-".join(map(str, value)))
@pytest.mark.parametrize("grid", GRIDS, ids=["plain", "transposed", "thick", "2d", "regions", "ras"])
def test_the_way_there_and_back_is_medsegs(tmp_path, grid, scheme, thick):
    grid = dict(grid)
    reader = grid.pop("reader", "NibabelIO")
    bundle = tiny_bundle("2d" if len(grid.get("patch", (1,) * 3)) == 2 else "3d_fullres", **grid)
    channels = len(bundle.plan.channels)
    settings = bundle.settings.replace(
        normalization=(scheme[0],) * channels, use_mask_for_norm=(scheme[1],) * channels
    )
    configurations = {bundle.configuration: settings.to_dict()}
    plan = bundle.plan.replace(configurations=configurations, reader=reader)
    bundle = replace(bundle, plan=plan)
    there, back = transforms_of(exported(bundle, tmp_path / "bundle"))
    volume = image(channels=channels)
    if thick:
        stretched = volume.geometry.affine @ np.diag([1.0, 1.0, 4.0, 1.0])
        volume = Volume(volume.array, Geometry(volume.shape, stretched))
    ours = preprocess(volume, plan, bundle.configuration)
    theirs = there({"image": metatensor(volume)})["image"]
    np.testing.assert_allclose(theirs.numpy(), ours.data, atol=2e-4 * np.abs(ours.data).max())
    logits = np.random.default_rng(1).normal(size=(plan.labels.n_outputs, *ours.record.shape))
    logits = logits.astype(np.float32)
    decided = back({"image": theirs, "pred": torch.from_numpy(logits)})["pred"]
    expected = restore_labels(logits, ours.record, plan.labels, settings)
    if reader == "NibabelIOWithReorient":
        assert expected.geometry != volume.geometry
        expected = from_ras(expected, volume.geometry)
    assert (decided.numpy() == expected.array).mean() >= EQUAL_VOXELS
    np.testing.assert_array_equal(decided.affine, volume.geometry.affine)


def test_the_affine_of_the_networks_grid_keeps_the_corners_of_the_crop(tmp_path):
    bundle = tiny_bundle(transpose=(2, 0, 1), spacing=(0.5, 1.0, 2.0))
    there, _ = transforms_of(exported(bundle, tmp_path / "bundle"))
    volume = image()
    grid = there({"image": metatensor(volume)})["image"]
    record = preprocess(volume, bundle.plan, bundle.configuration).record
    low = np.zeros(4)
    low[3] = 1
    for axis, (start, _) in enumerate(record.crop):
        low[2 - bundle.plan.transpose_forward[axis]] = start - 0.5
    corner = np.asarray(grid.affine) @ np.array([-0.5, -0.5, -0.5, 1.0])
    np.testing.assert_allclose(corner, volume.geometry.affine @ low, atol=1e-6)
    np.testing.assert_allclose(grid.pixdim, record.new_spacing, rtol=0.2)


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)])
@pytest.mark.parametrize("shape", [(13, 9, 21), (3, 5, 8)])
def test_tiles_weights_and_flips_are_medsegs(patch, shape):
    from medseg.exchange.monai_scripts.inferer import TiledInferer

    bundle = tiny_bundle("2d" if len(patch) == 2 else "3d_fullres", patch=patch)
    network = bundle.network("0")
    data = np.random.default_rng(2).normal(size=(1, *shape)).astype(np.float32)
    axes = tuple(range(len(patch)))
    ours = sliding_window(network, data, patch, 3, axes, threads=1)
    with torch.inference_mode():
        theirs = TiledInferer(patch, 3, 0.5, axes)(torch.from_numpy(data[None]), network)
    assert np.abs(theirs[0].numpy().astype(np.float32) - ours.astype(np.float32)).max() <= 2e-3


def test_an_axis_from_left_to_right_is_not_flipped_for_labels_with_sides():
    from medseg.exchange.monai_scripts.inferer import TiledInferer

    inferer = TiledInferer((8, 8, 8), mirror_axes=(0, 1, 2), sided=True)
    left_right_last = torch.diag(torch.tensor([-2.0, 1.0, 1.0, 1.0]))[[2, 1, 0, 3]]
    flips = inferer._flips(left_right_last)
    assert len(flips) == 4
    assert not [flip for flip in flips if 4 in flip]


def test_sums_too_large_for_16_bits_are_made_with_32():
    from medseg.exchange.monai_scripts.inferer import TiledInferer

    logits = TiledInferer((4, 4, 4))(torch.ones(1, 1, 4, 4, 4), lambda x: x * 6e4)
    assert float(logits.max()) == pytest.approx(6e4, rel=1e-3)
    with pytest.raises(ValueError, match="not finite"):
        TiledInferer((4, 4, 4))(torch.ones(1, 1, 4, 4, 4), lambda x: x * torch.nan)


@pytest.mark.parametrize("kind", STEP_KINDS)
def test_cleaning_is_medsegs(kind):
    from medseg.exchange.monai_scripts.transforms import CleanComponentsd

    labels = np.random.default_rng(3).integers(0, 3, (12, 11, 10)).astype(np.uint8)
    labels[np.random.default_rng(4).random(labels.shape) < 0.6] = 0
    labels[2:7, 2:7, 2:7] = 1
    labels[4, 4, 4] = 0
    steps = [{"kind": kind, "labels": [1, 2], "min_mm3": 6.0 if kind == "remove_small" else None}]
    volume = Volume(labels[None], Geometry(labels.shape, np.diag([1.0, 1.0, 2.0, 1.0])))
    theirs = CleanComponentsd("pred", steps)({"pred": metatensor(volume)})["pred"].numpy()
    ours = apply(volume, Postprocessing.from_dict({"steps": steps})).array
    assert (ours != labels).any()
    np.testing.assert_array_equal(theirs, ours)


def test_post_processing_of_an_ensemble_and_unknown_steps_do_not_go_along(tmp_path):
    together = {"ensemble": True, "steps": [{"kind": "keep_largest", "labels": [1]}]}
    config = exported(replace(tiny_bundle(), postprocessing=together), tmp_path / "a")
    assert "CleanComponentsd" not in json.dumps(config)
    for step in ({"kind": "$exit()", "labels": [1]}, {"kind": "keep_largest"}, 3, {"run": "it"}):
        with pytest.raises(BundleError, match="unknown"):
            export(replace(tiny_bundle(), postprocessing={"steps": [step]}), tmp_path / "b", None)
    assert not (tmp_path / "b").exists()


def test_monai_finds_all_properties_and_the_network_has_the_shapes_of_the_metadata(tmp_path, on_path):
    from monai.bundle import ConfigWorkflow, verify_net_in_out

    bundle = tiny_bundle(folds=2, labels=REGIONS, channels=("T1", "T2"))
    export(bundle, tmp_path / "bundle", None)
    on_path(tmp_path / "bundle")
    write(image(channels=2), tmp_path / "images" / "x.nii.gz")
    configs = tmp_path / "bundle" / "configs"
    config, meta = str(configs / "inference.json"), str(configs / "metadata.json")
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    workflow = ConfigWorkflow(
        config,
        meta,
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(tmp_path / "bundle"),
        dataset_dir=str(tmp_path / "images"),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.channel_def == {"0": "whole", "1": "core"}


@pytest.mark.parametrize("network", ["unet", "resenc-unet", "segresnet"])
@pytest.mark.parametrize("folds", [1, 2])
def test_the_exported_network_computes_what_medsegs_does(tmp_path, on_path, network, folds):
    from monai.bundle import ConfigParser

    plan = tiny_plan()
    settings = plan.configuration("3d_fullres")
    changed = settings.replace(architecture={**settings.architecture.to_dict(), "network": network})
    plan = plan.replace(configurations={"3d_fullres": changed.to_dict()})
    from medseg.nets import build_network

    states = [build_network(changed.architecture, 1, 3).state_dict() for _ in range(folds)]
    weights = {str(number): (lambda state=state: state) for number, state in enumerate(states)}
    bundle = replace(tiny_bundle(), plan=plan, weights=weights)
    export(bundle, tmp_path / "bundle", None)
    on_path(tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(str(tmp_path / "bundle" / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(tmp_path / "bundle"), "cpu"
    loaded = parser.get_parsed_content("network")
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.inference_mode():
        expected = sum(bundle.network(fold)(x) for fold in bundle.folds) / folds
        torch.testing.assert_close(loaded(x), expected)


def test_weights_are_plain_tensors_under_nnunets_names(tmp_path):
    bundle = tiny_bundle(folds=3)
    export(bundle, tmp_path / "bundle", "1")
    state = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)
    expected = bundle.state_dict("1")
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_scripts_import_nothing_of_medseg(tmp_path):
    export(tiny_bundle(), tmp_path / "bundle", None)
    found = set()
    for path in (tmp_path / "bundle" / "scripts").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"monai", "nibabel", "numpy", "scipy", "scripts", "torch"}


def test_names_that_monai_would_run_stay_text(tmp_path, on_path):
    from monai.bundle import ConfigParser

    trap = tmp_path / "trap"
    code = f"$open({str(trap)!r}, 'w')"
    labels = LabelSet.parse({"background": 0, code: 1, "%no/such.json": 2})
    bundle = tiny_bundle(labels=labels, channels=("@device",))
    bundle = replace(bundle, plan=bundle.plan.replace(dataset_name="$1/0"))
    export(bundle, tmp_path / "bundle", None)
    on_path(tmp_path / "bundle")
    parser = ConfigParser()
    configs = tmp_path / "bundle" / "configs"
    parser.read_config(str(configs / "inference.json"))
    parser.read_meta(str(configs / "metadata.json"))
    meta = parser.get_parsed_content("_meta_")
    assert not trap.exists()
    names = meta["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert [name.strip() for name in names.values()] == ["background", code, "%no/such.json"]
    assert meta["data_source"].strip() == "$1/0"


def test_names_in_any_script_are_kept(tmp_path):
    labels = LabelSet.parse({"background": 0, "Leber größer": 1, "肝臓": 2})
    export(tiny_bundle(labels=labels), tmp_path / "bundle", None)
    meta = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text(encoding="utf-8"))
    channels = meta["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {"0": "background", "1": "Leber größer", "2": "肝臓"}


def test_a_cascade_is_refused_before_anything_is_written(tmp_path):
    first = tiny_bundle()
    for cascade in (tiny_bundle("3d_cascade_fullres"), tiny_bundle("3d_cascade_fullres", previous=first)):
        with pytest.raises(BundleError, match="cascade"):
            export(cascade, tmp_path / "out", None)
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(OutputError, match="something else"):
            export(tiny_bundle(), out, None)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    export(tiny_bundle(), tmp_path / "empty", None)
    export(tiny_bundle(folds=2), tmp_path / "empty", None)
    state = torch.load(tmp_path / "empty" / "models" / "model.pt", weights_only=True)
    assert any(name.startswith("networks.1.") for name in state)


def test_weights_that_do_not_fit_and_folds_that_are_missing_leave_nothing(tmp_path):
    bundle = tiny_bundle()
    broken = replace(bundle, weights={"0": dict})
    for model, fold in ((broken, None), (bundle, "4")):
        with pytest.raises(BundleError):
            export(model, tmp_path / "out", fold)
    assert not list(tmp_path.iterdir())


def test_ct_statistics_that_the_plan_lacks_are_missed_at_once(tmp_path):
    bundle = tiny_bundle()
    settings = bundle.settings.replace(normalization=("ct",))
    plan = bundle.plan.replace(configurations={"3d_fullres": settings.to_dict()}, intensity={})
    with pytest.raises(BundleError, match="intensities"):
        export(replace(bundle, plan=plan), tmp_path / "out", None)


def test_images_of_a_folder_become_cases(tmp_path):
    from medseg.exchange.monai_scripts.workflow import find_cases

    for name in ("b.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    cases = find_cases(str(tmp_path), 2)
    assert [case["name"] for case in cases] == ["a", "b"]
    assert [isinstance(case["image"], list) for case in cases] == [True, False]
    with pytest.raises(ValueError, match="case a has 2 files; expected 3"):
        find_cases(str(tmp_path), 3)


def test_a_slice_is_a_volume_of_one(tmp_path):
    there, back = transforms_of(exported(tiny_bundle("2d", patch=(8, 8)), tmp_path / "bundle"))
    slice_of = metatensor(image(shape=(13, 11, 1)))
    flat = there({"image": slice_of[..., 0]})["image"]
    np.testing.assert_array_equal(flat.numpy(), there({"image": slice_of})["image"].numpy())
    assert back({"image": flat, "pred": torch.zeros(3, *flat.shape[1:])})["pred"].shape == (1, 13, 11, 1)


def test_an_image_that_does_not_fit_is_said(tmp_path):
    there, _ = transforms_of(exported(tiny_bundle(), tmp_path / "bundle"))
    with pytest.raises(ValueError, match="1 channels"):
        there({"image": metatensor(image(channels=2))})
    broken = image()
    array = broken.array.copy()
    array[0, 4, 4, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        there({"image": metatensor(broken.with_array(array))})
