"""The objectives that `train.objective` may name, and the module of each. This module does not import torch."""

OBJECTIVES = {
    # name              module
    "adversarial_flow": "afm_pipe.objectives.adversarial_flow.objective",
}
