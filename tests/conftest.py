import os
import signal

# In the background of a shell Ctrl-C is ignored, and every process that a test starts inherits it.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
