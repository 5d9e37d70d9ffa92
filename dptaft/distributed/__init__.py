"""Several processes that share the records of one run (`torchrun -m dptaft train ...`); see docs/parallel.md.

Importing this package costs nothing: `torch.distributed` is loaded only where a launcher started several
processes.
"""

from dptaft.distributed.launch import Launch, launched, require_one_process

__all__ = ["Launch", "launched", "require_one_process"]
