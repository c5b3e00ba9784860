"""Imports every module of the package, and attributes with it; fails if anything tries to reach a network."""

import importlib
import pkgutil
import sys
from pathlib import Path

from network import require_silence, watch

watch()
package = importlib.import_module("trak_fast")
for module in pkgutil.walk_packages(package.__path__, "trak_fast."):
    if module.name.endswith("__main__") or ".compat.startup" in module.name:  # programs
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # a library that is not installed
        if (error.name or "").startswith("trak_fast"):
            raise

import torch  # noqa: E402
from language_models import B, Language, texts  # noqa: E402

folder = Path(sys.argv[1])
torch.manual_seed(0)
model, batch = Language(tied=False), texts()
state = model.state_dict()
traker = package.TRAKer(model, "causal_lm", B, folder, proj_dim=16)
traker.load_checkpoint(state, 0)
traker.featurize(batch, num_samples=B)
traker.finalize_features()
traker.start_scoring_checkpoint("test", state, 0, num_targets=B)
traker.score(batch, num_samples=B)
traker.finalize_scores("test")
package.info()
require_silence()
