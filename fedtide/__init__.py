"""Asynchronous federated learning over MQTT for fleets of small devices."""
