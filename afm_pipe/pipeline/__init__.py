"""The stages as functions: each reads its declared inputs, calls the library and writes its declared outputs.

The scripts in stages/, which DVC runs, and the commands of `afm-pipe` call these functions.
"""

from afm_pipe.pipeline.find import count_images, load_sampler, model_config, open_latents, require_memory, run_budget
from afm_pipe.pipeline.images import autoencoder, classifier, encode, prepare, reference
from afm_pipe.pipeline.pool import pool, time_text
from afm_pipe.pipeline.results import report, tables, toy
from afm_pipe.pipeline.runs import evaluate, export, export_samples, import_weights, sample
from afm_pipe.pipeline.training import guide, train
