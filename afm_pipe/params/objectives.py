"""The objectives that `train.objective` may name, and the module of each. This module does not import torch."""

OBJECTIVES = {
    # name              module
    "adversarial_flow": "afm_pipe.objectives.adversarial_flow.objective",
    "flow_matching": "afm_pipe.objectives.flow_matching",
    "continuous_adversarial_flow": "afm_pipe.objectives.continuous_adversarial_flow",
}

WITHOUT_DISCRIMINATOR = {"flow_matching"}
VELOCITIES = {"flow_matching", "continuous_adversarial_flow"}
"""Those whose network is a velocity; their settings are in the section `flow` of a run."""
