"""The demo: a broker, a coordinator process, and simulated devices that train a model on real data."""
