"""Roundings (and activation steps) learned unit by unit, so that each unit's output comes near the float network's."""
