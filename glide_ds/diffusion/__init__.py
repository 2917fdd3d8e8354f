"""The Gaussian diffusion process: schedules, losses, samplers."""

from glide_ds.diffusion.losses import Gaussian, reverse_kl
from glide_ds.diffusion.process import Diffusion, Prediction, create_diffusion
from glide_ds.diffusion.samplers import SAMPLERS
from glide_ds.diffusion.sampling import sample
from glide_ds.diffusion.schedule import SPACINGS
