"""The torch modules that are the graphs of a bundle, and the ONNX Runtime operators they emit."""
