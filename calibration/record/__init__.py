"""One quantized layer, whatever method made it: its values, its packed form, what describes it."""
