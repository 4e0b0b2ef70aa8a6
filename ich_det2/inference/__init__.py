"""From files on disk to a diagnosis."""

BACKENDS = ("eager", "onnxruntime", "openvino")
"""Engines of a network on a CPU; ``eager`` is PyTorch as it is. See ``accelerate``."""

ENGINES = ("local", "ray")
"""What diagnoses an archive: this machine, or a cluster. See ``archive``."""
