"""What tests of models share: random numbers of a seed, modules filled with them, and the logits of two sequences."""
import torch

IDS_ST = torch.arange(2, 26).view(2, 12)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0):
    """The module with random weights of moderate size."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=100 * seed + index))
    return module


def logits(model):
    with torch.no_grad():
        return model(IDS_ST).logits
