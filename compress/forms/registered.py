"""Every form by name, each imported when it is first looked up.

In a native checkpoint a file of this name, written at export, imports the forms that the checkpoint holds.
"""

from compress.registry import Registry

from .base import REGISTERED, Form

FORMS: Registry[Form] = Registry("compress.forms", "form", REGISTERED)
