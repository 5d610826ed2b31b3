# The public names: the one list of them, which the type checker and `__init__.py` read.
from magic_fast import integrations as integrations
from magic_fast._version import __version__ as __version__
from magic_fast.api.adapters.extract import extract_adapter as extract_adapter
from magic_fast.api.adapters.extracted import ExtractedAdapter as ExtractedAdapter
from magic_fast.api.adapters.merge import merge_adapters as merge_adapters
from magic_fast.api.checkpoints.calibrate import calibrate_checkpoints as calibrate_checkpoints
from magic_fast.api.checkpoints.inspect import inspect_checkpoints as inspect_checkpoints
from magic_fast.api.checkpoints.merge import merge_checkpoints as merge_checkpoints
from magic_fast.api.checkpoints.merge import plan_checkpoints as plan_checkpoints
from magic_fast.api.checkpoints.sensitive_layers import (
    sensitive_layers_of_checkpoints as sensitive_layers_of_checkpoints,
)
from magic_fast.api.checkpoints.series import merge_series as merge_series
from magic_fast.api.checkpoints.sweep import SweepReport as SweepReport
from magic_fast.api.checkpoints.sweep import sweep_checkpoints as sweep_checkpoints
from magic_fast.api.data.checkpoints import (
    merge_checkpoints_by_data as merge_checkpoints_by_data,
)
from magic_fast.api.data.merge import merge_by_data as merge_by_data
from magic_fast.api.data.settings import DataMergeReport as DataMergeReport
from magic_fast.api.results import AdapterReport as AdapterReport
from magic_fast.api.results import CalibrationReport as CalibrationReport
from magic_fast.api.results import FeatureReport as FeatureReport
from magic_fast.api.results import MergeResult as MergeResult
from magic_fast.api.tensors.calibrate_features import calibrate_features as calibrate_features
from magic_fast.api.tensors.calibrate_weights import calibrate_weights as calibrate_weights
from magic_fast.api.tensors.masks import EmrModels as EmrModels
from magic_fast.api.tensors.masks import consensus_mask as consensus_mask
from magic_fast.api.tensors.masks import emr as emr
from magic_fast.api.tensors.masks import task_masks as task_masks
from magic_fast.api.tensors.merge import merge as merge
from magic_fast.api.tensors.merge import merge_task_vectors as merge_task_vectors
from magic_fast.api.tensors.merge_into import merge_into as merge_into
from magic_fast.api.tensors.sensitive_layers import sensitive_layers as sensitive_layers
from magic_fast.api.tensors.spectrum import lines as lines
from magic_fast.api.tensors.spectrum import svc as svc
from magic_fast.api.tensors.stats import TensorStatistics as TensorStatistics
from magic_fast.api.tensors.stats import kth_magnitude as kth_magnitude
from magic_fast.api.tensors.stats import row_norms as row_norms
from magic_fast.api.tensors.stats import row_stats as row_stats
from magic_fast.api.tensors.stats import select as select
from magic_fast.api.tensors.stats import task_vector_stats as task_vector_stats
from magic_fast.api.tensors.sweep import sweep as sweep
from magic_fast.api.tensors.trim import trim as trim
from magic_fast.calibration.feature import FeatureCalibration as FeatureCalibration
from magic_fast.calibration.registry import register_calibration as register_calibration
from magic_fast.calibration.sensitivity.lists import SensitivityReport as SensitivityReport
from magic_fast.calibration.sensitivity.lists import sensitive_from_file as sensitive_from_file
from magic_fast.calibration.tensors import TensorFilter as TensorFilter
from magic_fast.calibration.weight import WeightCalibration as WeightCalibration
from magic_fast.config.schema import MergeConfig as MergeConfig
from magic_fast.engine.execute.registry import register_executor as register_executor
from magic_fast.engine.output.report import MergeReport as MergeReport
from magic_fast.engine.output.report import Progress as Progress
from magic_fast.engine.output.verify import VerifyReport as VerifyReport
from magic_fast.engine.output.verify import verify_checkpoint as verify_checkpoint
from magic_fast.engine.plan.plan import MergePlan as MergePlan
from magic_fast.errors import BackendError as BackendError
from magic_fast.errors import CheckpointError as CheckpointError
from magic_fast.errors import ConfigError as ConfigError
from magic_fast.errors import InputError as InputError
from magic_fast.errors import InternalError as InternalError
from magic_fast.errors import MagicFastError as MagicFastError
from magic_fast.errors import NonFiniteError as NonFiniteError
from magic_fast.errors import OutputError as OutputError
from magic_fast.methods.registration import register_method as register_method
from magic_fast.ops.registry import backends as backends
from magic_fast.ops.registry import register_backend as register_backend
