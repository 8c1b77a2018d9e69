"""DeepSpeed behind one interface, or plain torch in one process; it knows no stage."""
