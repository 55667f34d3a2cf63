"""Mistakes that could be made in Objective-C: what to replace by what, once. The driver must fail with each.

MUTANTS, QOS_MUTANTS and LEAKS are of device_ane.m, POWER_MUTANTS of power_apple.m. ``find`` stands there exactly once.
Those of LEAKS lose memory that no counter sees: leak checkers find them.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of a source."""

    name: str
    find: str
    put: str


MUTANTS = [
    Mutant("request_leaked", "[request->request release];", ""),
    Mutant("model_leaked", "[(id)model release];", "(void)model;"),
    Mutant("model_released_twice", "[(id)model release];", "[(id)model release]; [(id)model release];"),
    Mutant(
        "model_not_retained",
        "[[framework.model inMemoryModelWithDescriptor:descriptor] retain]",
        "[framework.model inMemoryModelWithDescriptor:descriptor]",
    ),
    Mutant("surface_object_leaked", "[surface->object release];", ""),
    Mutant("surface_leaked", "if (surface->surface != NULL) CFRelease(surface->surface);", ""),
    Mutant("no_pool", "    @autoreleasepool {\n        @try", "    {\n        @try"),
    Mutant(
        "exception_passes",
        "@catch (id exception) {\n            result = raised",
        "@catch (NSString *exception) {\n            result = raised",
    ),
    Mutant("other_qos", "program->qos = (unsigned int)device->qos;", "program->qos = 33;"),
    Mutant(
        "never_unloaded",
        'return guarded(program->device, ANELLM_COMPILE, "unloadWithQoS", unload_body, program);',
        "program->loaded = 0; program->device->counters.loaded--; return unload_body == NULL;",
    ),
    Mutant("unloaded_with_the_last_request", "    ane_unload(ane); /* now", "    /* now"),
    Mutant(
        "compile_unchecked",
        'return ok ? ANELLM_OK : failed(device, ANELLM_COMPILE, "compileWithQoS", error);',
        "return ANELLM_OK;",
    ),
    Mutant(
        "load_unchecked",
        "if ([program->model loadWithQoS:program->qos options:@{} error:&error]) return",
        "if ([program->model loadWithQoS:program->qos options:@{} error:&error] || error != (id)program) return",
    ),
    Mutant(
        "evaluate_unchecked",
        "request:request->request error:&error])\n        return ANELLM_OK;",
        "request:request->request error:&error] || error != (id)call)\n        return ANELLM_OK;",
    ),
    Mutant(
        "unload_unchecked",
        "if (![program->model unloadWithQoS:program->qos error:&error])",
        "if (![program->model unloadWithQoS:program->qos error:&error] && error == (id)program)",
    ),
    Mutant(
        "write_unchecked",
        "if ([data writeToFile:path atomically:YES]) return ANELLM_OK;",
        "[data writeToFile:path atomically:YES];\n    if (data != nil) return ANELLM_OK;",
    ),
    Mutant(
        "request_unchecked", "if (request->request != nil) return ANELLM_OK;", "if (call != NULL) return ANELLM_OK;"
    ),
    Mutant("descriptor_unchecked", "if (descriptor == nil) return", "if (call == NULL) return"),
    Mutant("domain_lost", "copy_text(domain, sizeof domain, [error domain]);", ""),
    Mutant("text_lost", "copy_text(text, sizeof text, [error localizedDescription]);", ""),
    Mutant("code_lost", "domain, (int64_t)[error code], text", "domain, 0, text"),
    Mutant(
        "surface_stays_locked",
        "const int code = (int)IOSurfaceUnlock(surface->surface, surface->options, NULL);",
        "const int code = 0;",
    ),
    Mutant(
        "unlocked_with_other_options",
        "(int)IOSurfaceUnlock(surface->surface, surface->options, NULL)",
        "(int)IOSurfaceUnlock(surface->surface, 0, NULL)",
    ),
    Mutant("freed_while_locked", "while (surface->locks > 0) {", "while (surface->locks > 9) {"),
    Mutant("evaluated_while_locked", "if (is_locked(request->surfaces[i])) return", "if (is_locked(NULL)) return"),
    Mutant(
        "lock_unchecked",
        "const int code = (int)IOSurfaceLock(surface->surface, options, NULL);",
        "const int code = 0 * (int)IOSurfaceLock(surface->surface, options, NULL);",
    ),
    Mutant("not_cleared", "memset(surface->base, 0, (size_t)surface->bytes);", "(void)0;"),
    Mutant("part_of_a_page", "(bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;", "bytes;"),
    Mutant(
        "size_unchecked",
        "if ((int64_t)IOSurfaceGetAllocSize(surface->surface) < surface->bytes)",
        "if ((int64_t)IOSurfaceGetAllocSize(surface->surface) < 0)",
    ),
    Mutant("indices_all_0", "[indices[side] addObject:@(index)];", "[indices[side] addObject:@(index - index)];"),
    Mutant("outputs_for_inputs", "const int side = i >= request->n_inputs;", "const int side = i < request->n_inputs;"),
    Mutant(
        "weights_nil", "weights:weights optionsPlist:nil", "weights:([weights count] ? weights : nil) optionsPlist:nil"
    ),
    Mutant(
        "text_is_a_string",
        "modelWithMILText:text weights",
        "modelWithMILText:(NSData *)[NSString stringWithUTF8String:call->mil] weights",
    ),
    Mutant("options_nil", "loadWithQoS:program->qos options:@{}", "loadWithQoS:program->qos options:nil"),
    Mutant(
        "text_not_written",
        'ANELLM_TRY(write_file(program, program->text, [folder stringByAppendingPathComponent:@"model.mil"]));',
        "(void)folder;",
    ),
    Mutant(
        "weights_not_written",
        "    ANELLM_TRY(write_weights(program, program->weights));\n    const BOOL",
        "    const BOOL",
    ),
    Mutant(
        "folder_left",
        "![[NSFileManager defaultManager] removeItemAtPath:folder->path error:&error])",
        "error != nil)",
    ),
    Mutant("folder_of_a_twin_removed", "if (--folder->users == 0) {", "if (--folder->users >= 0) {"),
    Mutant("folder_of_others_removed", "if (!others && [", "if (others >= 0 && ["),
    Mutant("folder_not_held", "if (lock >= 0) flock(lock, LOCK_SH | LOCK_NB);", ""),
    Mutant("folder_held_for_ever", "if (folder->lock >= 0) close(folder->lock);", ""),
    Mutant("folder_anywhere", "if (!is_plain_name([name UTF8String]))", 'if (!is_plain_name("x"))'),
    Mutant("paths_unchecked", 'strstr(path, "..") != NULL)', "path == NULL)"),
    Mutant("no_backoff", "if (wait > 0.0) {", "if (wait > 1e9) {"),
    Mutant("never_asks_what_is_compiled", "if (!framework.has_cache ||", "if (framework.has_cache ||"),
    Mutant("asks_though_it_should_not", "!framework.has_cache || !program->device->use_cache", "!framework.has_cache"),
    Mutant(
        "exception_of_the_question_passes",
        "@catch (id exception) {\n        (void)exception; /* what cannot",
        "@catch (NSString *exception) {\n        (void)exception; /* what cannot",
    ),
    Mutant("hit_not_counted", "device->counters.cache_hits++;", ""),
    Mutant("bad_hit_not_compiled", "if (status != ANELLM_OK && program->from_cache)", "if (status > 99)"),
    Mutant(
        "compiled_after_any_bad_load",
        "if (status != ANELLM_OK && program->from_cache)",
        "if (status != ANELLM_OK)",
    ),
    Mutant(
        "late_failure_not_counted",
        "if (status == ANELLM_COMPILE) program->device->counters.compile_failures++;",
        "",
    ),
    Mutant("not_loaded_again", "if (status == ANELLM_OK) status = load_model(program);", ""),
    Mutant("text_not_retained", "program->text = [text retain];", "program->text = text;"),
    Mutant(
        "missing_folder_is_a_failure",
        "if (!others && [[NSFileManager defaultManager] fileExistsAtPath:folder->path] &&",
        "if (!others &&",
    ),
    Mutant("no_limit_of_compiles", "device->max_compiles > 0 && number", "device->max_compiles > 9 && number"),
    Mutant("unloaded_program_evaluated", "if (!program->loaded) return refuse", "if (program == NULL) return refuse"),
    Mutant(
        "request_does_not_keep_its_program",
        "    atomic_fetch_add(&program->references, 1);\n    struct request_call",
        "    struct request_call",
    ),
]

LEAKS = [
    Mutant("text_leaked", "    [program->text release];\n", ""),
    Mutant("weights_leaked", "    [program->weights release];\n", ""),
    Mutant("path_leaked", "[folder->path release];", ""),
    Mutant("signature_leaked", "    anellm_ane_signature_free(program->signature);\n", ""),
    Mutant("spare_folder_leaked", "    free(fresh);\n", ""),
    Mutant("surfaces_of_a_request_leaked", "    free(request->surfaces);\n", ""),
    Mutant("device_leaked", "    pthread_mutex_destroy(&device->mutex);\n    free(device);\n", ""),
]

QOS_MUTANTS = [  # for the driver that measures
    Mutant("evaluated_under_another_qos", "evaluateWithQoS:program->qos", "evaluateWithQoS:21"),
    Mutant("unloaded_under_another_qos", "unloadWithQoS:program->qos", "unloadWithQoS:21"),
    Mutant("loaded_under_another_qos", "loadWithQoS:program->qos options", "loadWithQoS:21 options"),
    Mutant("never_another_qos", "PROBE_MARGIN = 0.9", "PROBE_MARGIN = 0.0"),
    Mutant("measured_under_one_qos", "new_device(qos, model->backoff", "new_device(21, model->backoff"),
    Mutant("goes_on_after_a_refusal", "return compiled == ANELLM_OK;", "return 1;"),
    Mutant("measured_each_time", "if (!measured.qos.measured) measure_qos", "if (device != NULL) measure_qos"),
    Mutant("measured_by_nobody", "    settle_qos(device);\n    struct ane_program", "    struct ane_program"),
    Mutant(
        "set_qos_ignored",
        "    device->qos = qos;\n    device->qos_measured = 0;",
        "    device->qos_measured = 0 * qos;",
    ),
    Mutant("probe_surfaces_leaked", "if (surfaces[i] != NULL) ane_surface_free(surfaces[i]);", ""),
    Mutant("probe_request_leaked", "    if (request != NULL) ane_request_free(request);\n", ""),
    Mutant("probe_program_leaked", "    if (program != NULL) ane_program_free(program);\n", ""),
    Mutant(
        "probe_counts",
        "struct ane_device *device = new_device(qos, model->backoff, model->max_compiles, model->use_cache);",
        "struct ane_device *device = (struct ane_device *)model; device->qos = qos; device->references++;",
    ),
]

POWER_MUTANTS = [
    Mutant("old_sample_leaked", "    CFRelease(power->sample);\n    power->sample = now;", "    power->sample = now;"),
    Mutant("new_sample_leaked", "        CFRelease(now);\n        return;", "        return;"),
    Mutant("delta_leaked", "    CFRelease(delta);\n", ""),
    Mutant("delta_released_twice", "    CFRelease(delta);\n", "    CFRelease(delta);\n    CFRelease(delta);\n"),
    Mutant("last_sample_leaked", "if (power->sample != NULL) CFRelease(power->sample);", ""),
    Mutant("sample_unchecked", "if (now == NULL) return;", ""),
    Mutant("delta_unchecked", "if (delta == NULL) {", "if (power == NULL) {"),
    Mutant("channels_cannot_be_changed", "[(NSDictionary *)channels mutableCopy]", "[(NSDictionary *)channels retain]"),
    Mutant("channels_unchecked", "if (channels == NULL) return;", ""),
    Mutant("subscription_unchecked", "if (ioreport.subscription == NULL) return;", ""),
    Mutant("parts_counted", 'hasSuffix:@"CPU Energy"', 'hasSuffix:@"CPU"'),
    Mutant("one_die_counted", '[name hasSuffix:@"CPU Energy"]', '[name isEqual:@"DIE_0_CPU Energy"]'),
    Mutant("one_engine_counted", '[name hasPrefix:@"ANE"]', '[name hasPrefix:@"ANE0_0"]'),
    Mutant("label_ignored", "strncmp(text, units[i].name, 2) == 0", "text[1] != 0"),
    Mutant("counts_back", "if (count > 0) power", "if (count != 0) power"),
    Mutant("counted_from_another_start", "        power->joules[i] = 0.0;\n        known", "        known"),
    Mutant("nothing_is_something", "if (begin_count(power)) return;", "if (begin_count(power) + 1) return;"),
    Mutant(
        "exception_passes",
        "            start_ioreport(power);\n        } @catch (id exception)",
        "            start_ioreport(power);\n        } @catch (NSString *exception)",
    ),
    Mutant(
        "reading_exception_passes",
        "read_thermal();\n        } @catch (id exception)",
        "read_thermal();\n        } @catch (NSString *exception)",
    ),
    Mutant(
        "no_pool",
        "    @autoreleasepool {\n        @try {\n            read_energy",
        "    {\n        @try {\n            read_energy",
    ),
    Mutant(
        "process_unchecked",
        "(rusage_info_t *)(void *)&usage) != 0) return 0;",
        "(rusage_info_t *)(void *)&usage) > 0) return 0;",
    ),
    Mutant("other_count", "*nanojoules = usage.ri_energy_nj;", "*nanojoules = usage.ri_billed_energy;"),
    Mutant("process_goes_back", "now > power->process_start ? 1e-9", "now > 0 ? 1e-9"),
    Mutant("nothing_is_0", "return usage.ri_energy_nj > 0;", "return 1;"),
    Mutant(
        "thermal_beyond",
        "state >= ANELLM_THERMAL_NOMINAL && state <= ANELLM_THERMAL_CRITICAL ?",
        "state >= ANELLM_THERMAL_NOMINAL ?",
    ),
]


def mutate(source: str, mutant: Mutant) -> str:
    """Return the source with the mistake in it."""
    assert source.count(mutant.find) == 1, f"{mutant.name}: {mutant.find!r} stands {source.count(mutant.find)} times"
    return source.replace(mutant.find, mutant.put)
