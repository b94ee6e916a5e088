"""What the gradient CV and the signals beside it say of real faults; study/README.md tells how."""
