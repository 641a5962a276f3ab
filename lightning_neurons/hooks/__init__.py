"""Watch a forward: find where each neuron gets its final value, capture it and change it."""
