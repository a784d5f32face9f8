// Of MKL, where torch is built with it; else null. A header of its own, without torch's.
#pragma once

extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
