"""Runs on TensorFlow, by tf.distribute."""
