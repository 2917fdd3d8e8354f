"""The subcommands of `glide-ds`, a file each: add_arguments(parser) and run(args)."""
