"""Looking through a network: what an output or a neuron rests on, and what excites it. Tensors in, tensors out."""
