"""Learns roundings (and activation steps) unit by unit, so that each unit's output is near the float network's."""
