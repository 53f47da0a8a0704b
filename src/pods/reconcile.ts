/**
One round of the control loop: make the kernel's maps equal to what the pods should have. Holds no state: each round starts from the maps.
*/
import type {PodSpec} from '../config/pods-file.js';
import {AgentError, PodError, reasonOf} from '../errors.js';
import type {Datapath} from '../loader/datapath.js';
import type {NetnsCookie} from '../maps/schema.js';
import {applyChange, readKernelState} from '../redirect/apply.js';
import {plan, type Change} from '../redirect/plan.js';
import {compilePolicy, type PodFacts, type PodPolicy} from '../redirect/policy.js';
import {readPodFacts} from './facts.js';

export interface Round {
	/** Names of the pods that are enrolled as they should be. */
	readonly enrolled: readonly string[];
	/** By pod name; '' for what concerns no pod. */
	readonly failures: ReadonlyMap<string, Error>;
	/** What was changed, as `enrol default/web`. */
	readonly changes: readonly string[];
}

/**
A pod that fails does not hold up the others, and what the kernel has for it stays as it is: an error never takes a pod out of capture.

@param proc - see {@link readPodFacts}.
*/
export function reconcile(datapath: Datapath, specs: readonly PodSpec[], proc: string): Round {
	const failures = new Map<string, Error>();
	const policies = readPolicies(specs, proc, failures);

	const actual = readKernelState(datapath.maps);
	const keep = new Set<NetnsCookie>([...actual.infos].filter(([, {name}]) => failures.has(name)).map(([cookie]) => cookie));
	const changes: string[] = [];
	for (const change of plan(actual, policies, keep)) {
		try {
			applyChange(datapath, change);
			changes.push(describe(change));
		} catch (error) {
			failures.set(change.pod, error instanceof AgentError
				? new PodError(change.pod, `${error.message}; nothing was changed for it`, {cause: error})
				: new PodError(change.pod, `the kernel refused to ${change.kind} it (${reasonOf(error)}); nothing was changed for it`, {cause: error}));
		}
	}

	return {enrolled: policies.map(({info}) => info.name).filter(name => !failures.has(name)), failures, changes};
}

function readPolicies(specs: readonly PodSpec[], proc: string, failures: Map<string, Error>): readonly PodPolicy[] {
	const read: Array<{spec: PodSpec; facts: PodFacts}> = [];
	for (const spec of specs) {
		try {
			read.push({spec, facts: readPodFacts(spec, proc)});
		} catch (error) {
			failures.set(spec.name, asPodError(spec, error));
		}
	}

	const policies: PodPolicy[] = [];
	for (const {spec, facts} of read) {
		// Which of two is right cannot be known, so neither is changed.
		const twin = read.find(other => other.spec !== spec && other.facts.cookie === facts.cookie);
		try {
			if (twin) {
				throw new PodError(spec.name, `it has the same network namespace as pod ${twin.spec.name}: take one of them out of the pods file`);
			}

			policies.push(compilePolicy(spec, facts));
		} catch (error) {
			failures.set(spec.name, asPodError(spec, error));
		}
	}

	return policies;
}

function asPodError({name}: PodSpec, error: unknown): Error {
	return error instanceof PodError ? error : new PodError(name, reasonOf(error), {cause: error});
}

const describe = ({kind, pod, steps}: Change) => kind === 'sweep' ? `swept ${steps.length} left-over list entries` : `${kind} ${pod}`;
