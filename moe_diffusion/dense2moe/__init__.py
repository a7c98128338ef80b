"""Dense2MoE (2510.09094): a dense diffusion transformer becomes one of experts and block groups."""
