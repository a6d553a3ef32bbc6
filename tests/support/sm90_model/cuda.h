#pragma once
#include "model.h"
