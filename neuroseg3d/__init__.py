from neuroseg3d.surroundings import prepare_libraries

__version__ = "0.1.0"

prepare_libraries()  # before anything asks for a user or a home
