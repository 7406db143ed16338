/* All operations at one level of the instruction set: compiled once per level, each time with
 * other flags and with LEVEL as the suffix of the exported names. */
#define JOIN(name, level) quantd_##name##_##level
#define EXPAND(name, level) JOIN(name, level)
#define NAME(name) EXPAND(name, LEVEL)

#include "rowops.h"
#include "attention.h"
#include "grouped.h"
#include "pairs.h"
#include "roofline.h"
