"""Start the guard: this folder becomes a package of its own, whatever is installed around it."""

import os
import sys
import types

package = types.ModuleType("jail")
package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
sys.modules["jail"] = package
sys.path.pop(0)  # a solution that says ``import judge`` means its own

guard = __import__("jail.guard", fromlist=["main"])
guard.main()
