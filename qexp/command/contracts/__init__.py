"""What a quantizer, a network and a data set from outside must keep: `python -m qexp.command.check_plugin`."""
