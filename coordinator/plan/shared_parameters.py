"""One parameter in several places, such as a transformer's embedding that is its output layer too.

Torch's joint graph takes each place for a parameter of its own and then misses gradients. So all places but
the first read the first one's parameter; autograd adds the gradients up.
"""

from typing import Any, Final

import torch

_OWNERS: Final = "_shared_parameter_owners"


def untied(model: torch.nn.Module) -> torch.nn.Module:
    """Change a model so that each shared parameter is registered once, under its first name.

    The model computes the same, can be copied, and ``named_parameters`` stays as it was.
    """
    owners: dict[int, tuple[torch.nn.Module, str]] = {}
    for module in model.modules():
        shared: dict[str, tuple[torch.nn.Module, str]] = {}
        for name, parameter in module._parameters.items():  # noqa: SLF001  (with duplicates; no public way)
            if parameter is not None and owners.setdefault(id(parameter), (module, name)) != (module, name):
                shared[name] = owners[id(parameter)]
        if shared:
            _read_elsewhere(module, shared)
    return model


def _read_elsewhere(module: torch.nn.Module, shared: dict[str, tuple[torch.nn.Module, str]]) -> None:
    """Replace parameters of a module by properties, as ``torch.nn.utils.parametrize`` does."""
    for name in shared:
        delattr(module, name)
    module.__dict__[_OWNERS] = shared  # not by setattr: an owner is not a child
    kind = type(module)
    properties = {name: property(_reader(name)) for name in shared}
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **properties})


def _reader(name: str) -> Any:
    def read(module: torch.nn.Module) -> torch.Tensor:
        owner, owners_name = module.__dict__[_OWNERS][name]
        value: torch.Tensor = getattr(owner, owners_name)
        return value

    return read
