"""Addresses of pages that have moved: each old page of the site leads on to the new one.

The rooms were numbered once more when they were moved into wings; bookmarks and links of papers still hold the old names.
"""
from __future__ import annotations

from pathlib import Path

#: Old page of the site: the page that took its place.
MOVED = {
    '00_records': '01_records',
    '00a_config': '02_config',
    '00_surroundings': '03_system.surroundings',
    '00b_processes': '04_system.processes',
    '00c_files': '05_system.files',
    '00f_folders': '06_system.folders',
    '00f_failures': '07_system.failures',
    '00c_grids': '10_studies.grids',
    '00e_headers': '10a_studies.headers',
    '00f_formats': '10b_studies.formats',
    '00d_schemas': '11_studies.schemas',
    '00f_names': '11a_studies.names',
    '01_nifti': '12_studies.nifti',
    '01a_layouts': '13_studies.layouts',
    '00d_brain': '14_studies.brain',
    '01b_cases': '15_studies.cases',
    '03a_identity': '16_studies.identity',
    '04a_split': '17_studies.split',
    '04b_download': '18_studies.download',
    '05_transforms': '19_studies.preprocess',
    '02_phantom': '23_phantom.cohort',
    '20_phantom': '23_phantom.cohort',
    '03_viz': '31_plots.planes',
    '30_viz': '31_plots.planes',
    '07_unet': '40_networks.unet',
    '08_losses': '41_networks.losses',
    '07a_windows': '42_networks.windows',
    '00e_tensors': '43_networks.tensors',
    '09a_checkpoint': '44_networks.checkpoint',
    '09d_models': '45_networks.models',
    '10b_calibration': '50_inference.calibration',
    '09b_postprocess': '51_inference.postprocess',
    '09f_manifest': '52_inference.manifest',
    '09g_guard': '53_inference.guard',
    '11_infer': '54_inference.predict',
    '09_metrics': '60_evaluation.metrics',
    '12a_diameters': '61_evaluation.diameters',
    '11a_evaluate': '62_evaluation.evaluate',
    '11c_figures': '63_evaluation.figures',
    '12_uncertainty': '64_evaluation.uncertainty',
    '13_xai': '65_evaluation.attribution',
    '04_eda': '66_evaluation.eda',
    '05a_augment': '70_training.augment',
    '06_data': '71_training.data',
    '09e_resume': '72_training.resume',
    '09c_tracking': '73_training.tracking',
    '10_train': '74_training.task',
    '10a_devices': '75_training.devices',
    '11b_crossval': '76_training.crossval',
    '13a_casepage': '80_review.casepage',
    '14_report': '81_review.report',
    '15_dashboard': '82_review.dashboard',
    '11d_convert': '85_delivery.convert',
    '14a_demo': '88_demo',
    '16_cli': '89_cli',
    '20_tutorial_end_to_end': '90_tutorial_end_to_end',
    '21_tutorial_msd': '91_tutorial_msd',
    '21a_tutorial_starter': '92_tutorial_starter',
    '17_contracts': '95_contracts',
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>This page has moved</title>
<link rel="canonical" href="{new}">
<script>location.replace("{new}" + location.hash)</script>
<meta http-equiv="refresh" content="1; url={new}">
</head>
<body><p>This page has moved: <a href="{new}">{new}</a>.</p></body>
</html>
"""


def write_redirects(docs: Path) -> None:
    "A page at each old address that leads to the new one; what is there already stays."
    for old, new in MOVED.items():
        if not (docs / f'{old}.html').exists():
            (docs / f'{old}.html').write_text(PAGE.format(new=f'{new}.html'), encoding='utf-8')
