"""Label maps of other programs, and Cellpose and StarDist where they are installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from medseg.errors import BundleError, ConfigError, DataError, GeometryError
from medseg.instances.finders import open_finder
from tests.instances.test_count import nuclei, volume


def test_labels_of_a_file_are_numbered_without_gaps(tmp_path: Path) -> None:
    labels = np.zeros((110, 120), np.uint16)
    labels[3:9, 4:8], labels[50:60, 70:90] = 40, 7
    tifffile.imwrite(tmp_path / "masks.tif", labels)
    found = open_finder(f"labels:{tmp_path / 'masks.tif'}").find(volume(nuclei()))
    np.testing.assert_array_equal(found.labels, (labels == 7).T + 2 * (labels == 40).T.astype(np.int32))
    assert found.source_ids is not None and found.source_ids.tolist() == [7, 40]
    assert np.isnan(found.scores).tolist() == [True, True]
    with pytest.raises(GeometryError, match="labels of an image"):
        open_finder(f"labels:{tmp_path / 'masks.tif'}").find(volume(nuclei()[:50]))


@pytest.mark.parametrize("extra", ["cellpose", "stardist"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, extra, None)  # what Python itself does for "there is none"
    with pytest.raises(ConfigError, match=rf"pip install 'medseg\[{extra}\]'"):
        open_finder(f"{extra}:model")


@pytest.mark.skipif(not importlib.util.find_spec("cellpose"), reason="medseg[cellpose] is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_model_file_of_cellpose_is_asked(tmp_path: Path) -> None:
    from cellpose.resnet_torch import CPnet

    CPnet([2, 32, 64, 128, 256], 3, sz=3, max_pool=True, diam_mean=30.0).save_model(str(tmp_path / "net"))
    finder = open_finder(f"cellpose:{tmp_path / 'net'}")
    found = finder.find(volume(nuclei()), diameter=8.0)
    assert found.labels.shape == (120, 110) and len(found.scores) == found.labels.max()
    with pytest.raises(DataError, match="picture"):
        finder.find(volume(np.zeros((20, 20, 9), np.uint8)))
    with pytest.raises(BundleError, match="no such file"):
        open_finder("cellpose:nothing")


@pytest.mark.skipif(not importlib.util.find_spec("stardist"), reason="medseg[stardist] is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_model_folder_of_stardist_is_asked(tmp_path: Path) -> None:
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
    from stardist.models import Config2D, StarDist2D

    made = StarDist2D(Config2D(n_rays=16, grid=(2, 2)), name="net", basedir=str(tmp_path))
    with h5py.File(tmp_path / "net" / "weights_best.h5", "w") as file:  # the layout of published models
        save_weights_to_hdf5_group(file, made.keras_model)
    found = open_finder(f"stardist:{tmp_path / 'net'}").find(volume(nuclei()))
    assert found.labels.shape == (120, 110) and len(found.scores) == found.labels.max()
    with pytest.raises(BundleError, match=r"config\.json"):
        open_finder("stardist:nothing")
