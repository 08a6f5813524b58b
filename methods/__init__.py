"""KV-cache compression methods behind one interface. One method is one file of this folder; see `methods.base`."""
