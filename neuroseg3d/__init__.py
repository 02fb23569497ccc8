"""Volumetric 3D brain-tumour segmentation: `import neuroseg3d as ns`, then `ns.segment('case/')`.

The names that a user starts with are listed in __init__.pyi and loaded when they are first touched (PEP 562).
"""
import lazy_loader

from neuroseg3d.system.surroundings import prepare_libraries

__version__ = "0.1.0"

prepare_libraries()  # before anything asks for a user or a home
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
