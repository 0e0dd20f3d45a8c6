"""Training plans from torch modules.

``task`` is what a model owner writes, ``build`` turns it into a plan, ``file`` keeps it on disk. Only this
package imports torch, and ``file`` and ``rejection`` do not even that: publishing a plan needs no torch.
"""
