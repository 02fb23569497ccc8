"The front door: what `import neuroseg3d as ns` offers, and where it is defined."
from .core import Case as Case, InputError as InputError
from .evaluation.attribution import explain_case as explain_case
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.metrics import score_case as score_case
from .evaluation.uncertainty import assess_case as assess_case
from .inference.predict import Prediction as Prediction, predict_case as predict_case, segment as segment
from .networks.checkpoint import Model as Model, load_model as load_model
from .phantom.cohort import make_phantom as make_phantom
from .plots.planes import show_planes as show_planes
from .review.dashboard import dashboard as dashboard
from .review.report import report_cohort as report_cohort
from .studies.cases import read_case as read_case
from .studies.layouts import find_cases as find_cases
from .studies.nifti import write_label as write_label
from .training.task import train as train

__version__: str
