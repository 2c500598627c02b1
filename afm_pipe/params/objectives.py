"""The objectives that `train.objective` may name, and the module that defines each; free of torch."""

OBJECTIVES = {
    # name              module
    "adversarial_flow": "afm_pipe.objectives.adversarial_flow.objective",
}
