"""From a run to a bundle: the encoder as an ONNX graph, vectors, index, vocabularies, registry."""
