"""The edge agent: trains the global model on a device's own data, without torch."""
