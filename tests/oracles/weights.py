"""Weights of the recorded models, from a formula: no random generator and no library's order of drawing matters."""

import torch


def fill(model, seed, drift=0.0):
    """Set the parameters, in the order of their names, to values that a formula gives; `drift` moves them a little."""

    def noise(start, count):
        x = torch.sin(torch.arange(start, start + count, dtype=torch.float64) * 12.9898) * 43758.5453
        return 2 * (x - x.floor()) - 1

    start = 1000 * seed
    for name, parameter in sorted(model.named_parameters()):
        values = noise(start, parameter.numel()) + drift * noise(start + 500_000, parameter.numel())
        values = 1 + 0.1 * values if "norm" in name else 0.5 * values
        parameter.data.copy_(values.view_as(parameter))
        start += parameter.numel()
    return model.eval()
