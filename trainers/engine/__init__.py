"""DeepSpeed or plain torch behind one interface; independent of the stages."""
