"""`python -m neuroseg3d COMMAND`: the command line of nbs/16_cli.ipynb"""
import sys

from neuroseg3d.cli import main

if __name__ == '__main__':
    sys.exit(main())
