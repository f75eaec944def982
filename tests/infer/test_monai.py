"""Bundles of the Model Zoo's kind, predicted by medseg and by MONAI itself."""

import importlib.util
import json
import threading
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from medseg import log
from medseg.errors import BundleError, Cancelled, ConfigError, DataError
from medseg.exchange.monai_in import NETWORKS, TRANSFORMS, Call, build_network, load_monai_bundle
from medseg.infer import Options, Segmenter, make_predictor
from medseg.infer import monai as predicting
from medseg.infer.monai import MonaiPredictor
from medseg.io.dataset import Case, read_image
from medseg.labels import LabelSet
from medseg.volume import Geometry, Volume
from tests.exchange import zoo
from tests.phantoms import GEOMETRIES, affine, noise, tilted

LOWRES = {"whole_body": "model_lowres.pt"}


def write(folder, name):
    """Write a bundle and an image for it; return the job for MONAI."""
    weights = LOWRES.get(name, "model.pt")
    root = zoo.write_bundle(folder / name, name, weights=weights)
    paths = [str(p) for p in zoo.write_image(folder / f"{name}_images", 4 if name == "brats" else 1)]
    return {
        "config": str(root / "configs" / "inference.json"),
        "root": str(root),
        "weights": str(root / "models" / weights),
        "data": [paths] if len(paths) > 1 else paths,
        "out": str(folder / f"{name}_out"),
    }


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Every kind of bundle with the label map that MONAI makes of an image."""
    folder = tmp_path_factory.mktemp("zoo")
    made = {name: write(folder, name) for name in zoo.ZOO}
    zoo.run_monai(list(made.values()))
    return made


def read(job):
    paths = job["data"][0] if isinstance(job["data"][0], list) else job["data"]
    return read_image(Case("case", tuple(map(Path, paths)), None, "case"))


def predictor(job, **options):
    return MonaiPredictor(load_monai_bundle(job["root"]), Options(threads=1, **options))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_label_maps_are_those_of_monai_voxel_by_voxel(name, jobs):
    truth = zoo.result(jobs[name]["out"])
    if name == "brats":
        truth = np.where(truth == 4, 3, truth)
    volume = read(jobs[name])
    result = predictor(jobs[name]).segment(volume)
    labels = result.volume.array[0]
    assert len(np.unique(truth)) > 1
    assert (labels == truth).mean() >= 0.9999
    assert result.volume.geometry == volume.geometry
    assert labels.dtype == result.labels.dtype


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ignite") is None or importlib.util.find_spec("fire") is None,
    reason="`python -m monai.bundle run` needs pytorch-ignite and fire",
)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_label_maps_are_those_of_the_command_of_monai(name, tmp_path):
    job = write(tmp_path, name)
    zoo.run_command(job, tmp_path)
    truth = zoo.result(job["out"])
    truth = np.where(truth == 4, 3, truth) if name == "brats" else truth
    assert (predictor(job).segment(read(job)).volume.array[0] == truth).mean() >= 0.9999


@pytest.mark.parametrize("name", zoo.ZOO)
def test_probabilities_are_on_the_grid_of_the_image_one_for_each_output(name, jobs, tmp_path):
    volume = read(jobs[name])
    result = predictor(jobs[name]).segment(volume, tmp_path / "p.npz")
    maps = np.load(tmp_path / "p.npz")["probabilities"]
    assert maps.shape == (result.labels.n_outputs, *volume.shape[::-1])
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert result.probabilities == tmp_path / "p.npz"
    labels = result.volume.array[0].transpose(2, 1, 0)
    if result.labels.has_regions:
        for probable, region in zip(maps, result.labels.foreground, strict=True):
            inside = result.labels.mask(labels, region)
            assert (inside | (probable < 0.5)).all()
    elif name not in (
        "prostate",
        "whole_body",
        "logits_last",
    ):  # these decide on another grid, or remove components
        assert (maps.argmax(axis=0) == labels).mean() > 0.9999


SMALL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
UNET = {**SMALL, "channels": [4, 8], "strides": [2]}
NETWORK_ARGUMENTS = {
    "AttentionUnet": UNET,
    "BasicUNet": {**SMALL, "features": [4, 4, 4, 4, 4, 4]},
    "BasicUNetPlusPlus": {**SMALL, "features": [4, 4, 4, 4, 4, 4]},
    "DynUNet": {
        **SMALL,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 8],
    },
    "FlexibleUNet": {**SMALL, "backbone": "resnet10", "decoder_channels": [8, 4, 4, 4, 4]},
    "SegResNet": {**SMALL, "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "SegResNetDS": {**SMALL, "init_filters": 8, "blocks_down": [1, 1]},
    "SwinUNETR": {**SMALL, "feature_size": 12, "depths": [1, 1, 1, 1]},
    "UNETR": {**SMALL, "img_size": [64, 32, 32], "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "UNet": UNET,
    "VNet": SMALL,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_on_the_list_predicts(name, jobs):
    torch.manual_seed(0)
    network = Call(name, NETWORK_ARGUMENTS[name])
    weights = build_network(network).state_dict()
    whole = load_monai_bundle(jobs["spleen"]["root"])
    inferer = Call("SlidingWindowInferer", {"roi_size": [64, 32, 32]})
    model = replace(whole, network=network, weights=lambda: weights, inferer=inferer)
    volume = noise(GEOMETRIES["flipped"])
    assert MonaiPredictor(model, Options(threads=1)).segment(volume).volume.geometry == volume.geometry


EXACT = {
    "CastToTyped": {"dtype": "float32"},
    "CropForegroundd": {"source_key": "image", "margin": 1},
    "DivisiblePadd": {"k": 8},
    "EnsureTyped": {"dtype": "float32"},
    "Orientationd": {"axcodes": "SPL"},
    "ResizeWithPadOrCropd": {"spatial_size": [20, 20, 20]},
    "SpatialPadd": {"spatial_size": [16, 9, 20], "mode": "constant", "constant_values": 3},
    "ThresholdIntensityd": {"threshold": -1e6},
}
CHANGING = {
    "CenterScaleCropd": {"roi_scale": [0.6, 0.6, 1]},
    "CenterSpatialCropd": {"roi_size": [6, 6, 6]},
    "ClipIntensityPercentilesd": {"lower": 1, "upper": 99},
    "NormalizeIntensityd": {"nonzero": True, "channel_wise": True},
    "Resized": {"spatial_size": [12, 12, 12], "mode": "trilinear"},
    "ScaleIntensityRangePercentilesd": {"lower": 1, "upper": 99, "b_min": 0, "b_max": 200},
    "ScaleIntensityRanged": {"a_min": 0, "a_max": 200, "b_min": 0, "b_max": 1, "clip": True},
    "ScaleIntensityd": {"minv": -1.0, "maxv": 1.0},
    "Spacingd": {"pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
}


class Bright(torch.nn.Module):
    """Finds what is brighter than 100."""

    def forward(self, x):
        return torch.cat([100 - x, x - 100], dim=1)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_on_the_list_is_undone(name, first, jobs):
    call = Call(name, {**EXACT, **CHANGING}[name])
    whole = load_monai_bundle(jobs["spleen"]["root"])
    decision = replace(whole.decision, decide_first=first)
    model = replace(whole, preprocessing=(call,), inferer=Call("SimpleInferer", {}), decision=decision)
    bright = MonaiPredictor(model, Options(threads=1))
    bright._network = Bright()
    volume = noise(GEOMETRIES["oblique"])
    result = bright.segment(volume).volume
    assert result.geometry == volume.geometry
    if name in EXACT:
        np.testing.assert_array_equal(result.array, volume.array > 100)


def test_the_way_back_in_small_parts_gives_the_same_labels(jobs, monkeypatch):
    volume = read(jobs["pediatric"])
    whole = predictor(jobs["pediatric"]).segment(volume).volume.array
    monkeypatch.setattr(predicting, "CHUNK_BYTES", 1)
    np.testing.assert_array_equal(predictor(jobs["pediatric"]).segment(volume).volume.array, whole)


@pytest.mark.parametrize("grid", ["flipped", "permuted", "oblique", "anisotropic", "one slice", "micron"])
@pytest.mark.parametrize("name", ["spleen", "whole_body", "pediatric"])
def test_every_grid_gets_its_own_grid_back(grid, name, jobs):
    if grid == "micron":
        geometry = Geometry((30, 28, 26), np.diag([1500.0, 1500.0, 2000.0, 1.0]), "micron")
    else:
        geometry = GEOMETRIES[grid]
    volume = noise(geometry)
    result = predictor(jobs[name]).segment(volume).volume
    assert result.geometry == volume.geometry


def test_micrometres_are_not_taken_for_millimetres(jobs):
    wide = np.diag([1.5, 1.5, 2.0, 1.0])
    array = noise(Geometry((30, 28, 26), wide)).array
    spleen = predictor(jobs["spleen"])
    thousand = np.diag([1000.0, 1000.0, 1000.0, 1.0]) @ wide
    same = spleen.segment(Volume(array, Geometry((30, 28, 26), thousand, "micron"))).volume.array
    np.testing.assert_array_equal(
        same, spleen.segment(Volume(array, Geometry((30, 28, 26), wide))).volume.array
    )


def test_the_affine_is_that_of_the_file_to_the_last_bit(tmp_path):
    from monai.transforms import LoadImage

    generator = np.random.default_rng(0)
    for number in range(40):
        matrix = tilted(
            affine("LPS", tuple(generator.uniform(0.3, 5, 3))), tuple(generator.uniform(-60, 60, 3))
        )
        image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), matrix)
        image.set_qform(matrix, 1)
        path = tmp_path / f"{number}.nii"
        nibabel.save(image, path)
        read = predicting._to_metatensor(read_image(Case("case", (path,), None, "case")))
        np.testing.assert_array_equal(np.asarray(read.affine), np.asarray(LoadImage()(path).affine))


def test_a_case_can_be_prepared_while_another_is_undone(jobs):
    spleen, volume = predictor(jobs["spleen"]), read(jobs["spleen"])
    expected = spleen.segment(volume).volume.array
    ready = [spleen.prepare(volume)]
    for _ in range(4):
        thread = threading.Thread(target=lambda: ready.append(spleen.prepare(volume)))
        thread.start()
        result = spleen.segment_prepared(volume, ready.pop(0))
        thread.join()
        np.testing.assert_array_equal(result.volume.array, expected)


def test_one_sigmoid_output_is_a_label_with_a_background(jobs, tmp_path):
    settings = zoo.spleen()
    settings["network_def"]["out_channels"] = 1
    settings["postprocessing"] = zoo.compose(zoo.SIGMOID, zoo.invert(), zoo.HALF, zoo.SAVE)
    root = zoo.write_bundle(tmp_path / "one", "one", settings)
    made = MonaiPredictor(load_monai_bundle(root), Options(threads=1))
    result = made.segment(read(jobs["spleen"]), tmp_path / "p.npz")
    maps = np.load(tmp_path / "p.npz")["probabilities"]
    assert result.labels == LabelSet.parse({"background": 0, "foreground": 1})
    np.testing.assert_allclose(maps.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(maps[1] >= 0.5, result.volume.array[0].transpose(2, 1, 0) == 1)


def test_only_the_largest_component_of_a_label_stays(jobs):
    model = load_monai_bundle(jobs["prostate"]["root"])
    assert model.decision.largest_before == ((1,), (2,))
    volume = read(jobs["prostate"])
    cleaned = predictor(jobs["prostate"]).segment(volume).volume.array
    every = MonaiPredictor(
        replace(model, decision=replace(model.decision, largest_before=())), Options(threads=1)
    )
    raw = every.segment(volume).volume.array
    assert ((cleaned != raw) <= (cleaned == 0)).all()
    assert (cleaned != raw).any()


def test_where_the_device_has_no_room_tiles_are_put_together_elsewhere(jobs, monkeypatch, caplog):
    volume = read(jobs["spleen"])
    expected = predictor(jobs["spleen"]).segment(volume).volume.array
    build, places = predicting.build_inferer, []

    def small(call, **changes):
        places.append(changes)
        if len(places) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(call, **changes)

    monkeypatch.setattr(predicting, "build_inferer", small)
    np.testing.assert_array_equal(predictor(jobs["spleen"]).segment(volume).volume.array, expected)
    assert places[1]["sw_batch_size"] == 1
    assert "put together on the CPU" in caplog.text


def test_prediction_stops_between_two_tiles(jobs):
    class Impatient(log.Listener):
        steps = 0

        def advanced(self, key, steps, note):
            self.steps += steps

        def cancelled(self):
            return self.steps >= 2

    swin, volume = predictor(jobs["spleen"]), read(jobs["spleen"])
    listener = Impatient()
    with log.listening(listener), pytest.raises(Cancelled):
        swin.segment(volume)
    assert listener.steps == 2


def test_the_progress_knows_how_many_tiles_there_are(jobs):
    class Counting(log.Listener):
        total, done = 0, 0

        def started(self, key, label, total):
            self.total += total or 0

        def advanced(self, key, steps, note):
            self.done += steps

    for name in ("spleen", "brats", "whole_body", "short_axis"):
        listener = Counting()
        with log.listening(listener):
            predictor(jobs[name]).segment(read(jobs[name]))
        assert listener.done == listener.total > 0, name


def test_an_image_with_other_channels_is_refused(jobs):
    with pytest.raises(DataError, match=r"1 channel, .* expects 4 \(T1c, T1, T2, FLAIR\)"):
        predictor(jobs["brats"]).segment(read(jobs["spleen"]))


def test_an_image_that_would_fill_the_memory_is_refused(jobs):
    kilometre = Volume(np.zeros((4, 4, 4), np.float32), Geometry((4, 4, 4), np.diag([1e4, 1e4, 1e4, 1])))
    with pytest.raises(DataError, match=r"voxels\. Crop it"):
        predictor(jobs["spleen"]).segment(kilometre)


@pytest.mark.parametrize(("options", "word"), [({"folds": ("0",)}, "fold"), ({"mirror": True}, "mirrored")])
def test_options_that_a_bundle_has_not_are_refused(options, word, jobs):
    with pytest.raises(ConfigError, match=word):
        predictor(jobs["spleen"], **options)


def test_a_step_is_ignored_with_one_line(jobs, caplog):
    predictor(jobs["spleen"], step=0.7, mirror=False)
    assert "--step is ignored" in caplog.text


def test_another_runtime_is_ignored_with_one_line(jobs, caplog):
    options = Options(threads=1)
    object.__setattr__(options, "runtime", "openvino")
    MonaiPredictor(load_monai_bundle(jobs["spleen"]["root"]), options)
    assert "--runtime is ignored" in caplog.text


def test_a_first_stage_is_refused(jobs):
    volume = read(jobs["spleen"])
    with pytest.raises(ConfigError, match="no first stage"):
        predictor(jobs["spleen"]).segment(volume, previous=volume)


def test_weights_of_another_network_are_refused(jobs):
    model = load_monai_bundle(jobs["spleen"]["root"])
    changed = replace(model.network, arguments={**model.network.arguments, "channels": [4, 8, 32]})
    with pytest.raises(BundleError, match="weights do not fit the UNet"):
        MonaiPredictor(replace(model, network=changed), Options(threads=1)).segment(read(jobs["spleen"]))


def test_weights_that_give_no_numbers_are_refused(jobs):
    model = load_monai_bundle(jobs["spleen"]["root"])
    damaged = {
        name: torch.full_like(value, torch.nan) if value.is_floating_point() else value
        for name, value in model.weights().items()
    }
    broken = replace(model, weights=lambda: damaged)
    with pytest.raises(BundleError, match="not finite"):
        MonaiPredictor(broken, Options(threads=1)).segment(read(jobs["spleen"]))


def test_an_image_of_a_size_that_the_network_cannot_take_is_one_sentence(jobs):
    whole = load_monai_bundle(jobs["spleen"]["root"])
    simple = replace(whole, preprocessing=(), inferer=Call("SimpleInferer", {}))
    with pytest.raises(BundleError, match="cannot take an image of"):
        MonaiPredictor(simple, Options(threads=1)).segment(noise(Geometry((13, 11, 9), np.eye(4))))


def test_provenance_names_the_bundle_and_its_versions(jobs):
    found = predictor(jobs["spleen"]).provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["models"][0]["sha256"] == load_monai_bundle(jobs["spleen"]["root"]).digest
    assert found["models"][0]["network"] == "UNet"
    assert {"monai", "torch", "medseg", "device"} <= set(found)


def test_a_folder_is_predicted_and_resumed_like_with_any_model(jobs, tmp_path):
    from medseg.pipeline import predict_folder

    images, out = Path(jobs["spleen"]["data"][0]).parent, tmp_path / "out"
    for status in ("done", "skipped"):
        rows = predict_folder(images, jobs["spleen"]["root"], out, resume=True, threads=1, device="cpu")
        assert [row.status for row in rows] == [status]
    labels = nibabel.load(out / "case.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), zoo.result(jobs["spleen"]["out"]))
    assert json.loads((out / "predictions.json").read_text())["labels"]["entries"]["spleen"] == 1


def test_a_monai_predictor_is_what_the_pipeline_asks_for(jobs):
    assert isinstance(make_predictor([load_monai_bundle(jobs["spleen"]["root"])]), Segmenter)


def test_a_bundle_is_not_averaged_with_another(jobs):
    models = [load_monai_bundle(jobs[name]["root"]) for name in ("spleen", "prostate")]
    with pytest.raises(BundleError, match="not averaged"):
        make_predictor(models)


def test_a_bundle_without_activation_still_gives_probabilities(jobs, tmp_path):
    volume = read(jobs["prostate"])  # its argmax is of logits
    predictor(jobs["prostate"]).segment(volume, tmp_path / "p.npz")
    maps = np.load(tmp_path / "p.npz")["probabilities"]
    np.testing.assert_allclose(maps.sum(axis=0), 1, atol=1e-4)
