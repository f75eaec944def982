"""Objects as files that others read: tables, outlines, label maps, a picture, and what was dropped."""

from medseg.instances.export.geojson import write_geojson
from medseg.instances.export.imagej import write_rois
from medseg.instances.export.label_map import write_label_map
from medseg.instances.export.overlay import write_overlay
from medseg.instances.export.panoptic_overlay import write_panoptic_overlay
from medseg.instances.export.qc import describe_qc, write_qc
from medseg.instances.export.tables import write_csv, write_parquet, write_table

__all__ = [
    "describe_qc",
    "write_csv",
    "write_geojson",
    "write_label_map",
    "write_overlay",
    "write_panoptic_overlay",
    "write_parquet",
    "write_qc",
    "write_rois",
    "write_table",
]
