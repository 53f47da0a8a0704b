/**
Whether bytes go past the TCP stack on this node: what the operator wishes, and what this kernel can be trusted with.
*/
import {probeAcceleration, type AccelerationFinding} from './acceleration-probe.js';
import {MAP_PROGRAMS, type Datapath} from './datapath.js';

export type AccelerationWish = 'off' | 'auto' | 'on';

export interface AccelerationState {
	readonly wish: AccelerationWish;
	/** What the probes were not content with; empty where they were, or were not asked. */
	readonly failures: readonly AccelerationFinding[];
}

/** What is in force, as {@link setAcceleration} left it. */
export function wishNow({maps}: Pick<Datapath, 'maps'>): AccelerationWish {
	const {acceleration} = maps.node.get(0)!;
	return acceleration === 'ACCELERATION_OFF' ? 'off' : acceleration === 'ACCELERATION_ON' ? 'on' : 'auto';
}

/**
Probes, unless it is switched off, and puts the wish in force by one map write: at once, for running connections too. Those that are switched off go on by TCP and
lose no byte. Stays in force without an agent.
*/
export function setAcceleration(datapath: Pick<Datapath, 'maps' | 'programs' | 'rawMaps'>, wish: AccelerationWish): AccelerationState {
	if (wish === 'off') {
		write(datapath, 'ACCELERATION_OFF');
		return {wish, failures: []};
	}

	const {oneQueue, findings} = probeAcceleration();
	const accelerated = datapath.rawMaps.get('accelerated')!;
	if (oneQueue === false) {
		datapath.programs.get('one_queue')!.detachMap(accelerated, MAP_PROGRAMS.one_queue);
	} else {
		datapath.programs.get('one_queue')!.attachMapLegacy(accelerated, MAP_PROGRAMS.one_queue);
	}

	write(datapath, wish === 'on' ? 'ACCELERATION_ON' : oneQueue === undefined ? 'ACCELERATION_WHERE_ASKED' : 'ACCELERATION_AUTO');
	return {wish, failures: findings.filter(({failure}) => failure !== undefined)};
}

/** For people: `auto`, or `auto, only for pods that say on, as this kernel fails: …`. */
export function describeAcceleration({wish, failures}: AccelerationState): string {
	const why = failures.map(({name, failure}) => `${name} (${failure})`).join('; ');
	return failures.length === 0 ? wish : wish === 'on' ? `on, although this kernel fails: ${why}` : `auto, which is on only for pods that say so, as this kernel fails: ${why}`;
}

function write({maps}: Pick<Datapath, 'maps'>, acceleration: string): void {
	maps.node.set(0, {...maps.node.get(0)!, acceleration});
}
